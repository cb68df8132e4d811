"""The settings of a Ray on this machine reach its processes, and nothing that this process starts later."""

from __future__ import annotations

import os

import pytest

from nev.cluster.session import LOCAL_ENVIRONMENT, set_defaults


def test_the_environment_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEV_TEST_SET", "the user's")
    monkeypatch.delenv("NEV_TEST_UNSET", raising=False)
    before = dict(os.environ)

    def start() -> None:
        with set_defaults({"NEV_TEST_SET": "1", "NEV_TEST_UNSET": "2"}):
            assert (os.environ["NEV_TEST_SET"], os.environ["NEV_TEST_UNSET"]) == ("the user's", "2")
            raise RuntimeError("no Ray")

    with pytest.raises(RuntimeError, match="no Ray"):
        start()
    assert dict(os.environ) == before


@pytest.mark.ray
def test_settings_reach_rays_processes_alone(ray_cluster: None) -> None:
    import ray

    @ray.remote
    def environment() -> dict[str, str | None]:
        return {name: os.environ.get(name) for name in LOCAL_ENVIRONMENT}

    assert ray.get(environment.remote()) == LOCAL_ENVIRONMENT
    assert not LOCAL_ENVIRONMENT.keys() & os.environ.keys()

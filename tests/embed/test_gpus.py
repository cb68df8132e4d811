"""What an embedding command requests where no GPU is up yet."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from nev.config.base import ConfigError
from nev.embed import gpus

Tell = Callable[[str], None]


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "cluster_gpus", lambda: 2)
    monkeypatch.setattr(gpus, "may_grow", lambda: False)
    assert (gpus.choose_gpus(None), gpus.choose_gpus(1)) == (2, 1)
    with pytest.raises(ConfigError, match=r"this machine has 2 GPUs, not 3: leave --gpus out"):
        gpus.choose_gpus(3)
    monkeypatch.setattr(gpus, "may_grow", lambda: True)
    assert gpus.choose_gpus(3) == 3


@pytest.mark.parametrize(("wanted", "up", "gangs"), [(0, 0, None), (3, 1, None), (3, 0, [[{"GPU": 1.0}]] * 3)])
def test_only_what_has_work_and_is_not_there_is_requested(
    wanted: int, up: int, gangs: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each GPU is a gang of its own: an autoscaler that can start some of them does."""
    requested: list[object] = []
    output = io.StringIO()

    def wait(gangs: object, tell: Tell, warn: Tell, stop: Callable[[], bool], remedy: str) -> bool:
        requested.append(gangs)
        tell("waiting; gpu did not start: [/] no [quota]")
        warn("no node type has [/] that")
        return stop()

    monkeypatch.setattr(gpus, "cluster_gpus", lambda: up)
    monkeypatch.setattr(gpus, "wait_for_room", wait)
    for terminal in (True, False):
        gpus.wait_for_gpu(wanted, Console(file=output, force_terminal=terminal, width=200))
    assert requested == ([] if gangs is None else [gangs, gangs])
    assert output.getvalue().count("no node type has [/] that") == len(requested)

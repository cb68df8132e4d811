"""What is wrong with a run is told before it begins, all of it at once."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from nev.common.errors import ErrorCollector, NotReady
from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.paths import with_absolute_paths
from nev.models.text import load_text
from nev.runs.folder import check_output, check_space, run_folder
from nev.runs.manifest import list_checkpoints
from nev.storage.reading import DataError
from nev.train.capacity import checkpoint_bytes
from nev.train.experiment import run_experiment

Make = Callable[..., Experiment]
Usage = namedtuple("Usage", "total used free")


def test_one_finding_is_itself_and_more_are_a_list() -> None:
    found = ErrorCollector()
    found.refuse()
    with found:
        raise DataError("no shards")
    with pytest.raises(DataError, match=r"^no shards$"):
        found.refuse()
    for message in ("no room", "no shards"):  # one of them is known already
        with found:
            raise ConfigError(message)
    with pytest.raises(NotReady, match=r"^2 things are in the way:\n  1\. no shards\n  2\. no room$"):
        found.refuse()


def test_a_bug_is_no_finding() -> None:
    with pytest.raises(ZeroDivisionError), ErrorCollector():
        1 / 0  # noqa: B018


def test_all_that_is_wrong_is_told_before_ray_starts(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("nev.train.experiment.connect", lambda: pytest.fail("Ray was started"))
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # though another test may have started one
    config = tiny(
        data__train=str(tmp_path / "nothing"),
        data__augment__auto="rand-x9",
        vision__trunk="vit_of_nobody",
        eval__best="top-2",
        tracking__uri="http://127.0.0.1:9",
        workers__gpus=99,
    )
    with pytest.raises(NotReady) as caught:
        run_experiment(config, Console(quiet=True))
    said = str(caught.value)
    assert said.startswith("6 things are in the way:")
    parts = (
        "nothing",
        "rand-x9",
        "vit_of_nobody",
        "'top-2' is not measured",
        "MLflow at http://127.0.0.1:9",
        "workers.gpus = 99",
    )
    for part in parts:
        assert part in said, part
    assert not list(Path(run_folder(with_absolute_paths(config))).glob("*")), "nothing is left behind"


def test_an_output_that_cannot_be_written(tmp_path: Path, tiny: Make) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output = .*file/runs.* cannot be used"):
        check_output(with_absolute_paths(tiny(output=str(tmp_path / "file" / "runs"))))
    config = with_absolute_paths(tiny())
    check_output(config)
    assert list(Path(run_folder(config)).iterdir()) == []


def test_room_for_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "new"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 3 * 2**30))
    check_space(str(run), checkpoints=2, size=2**30)
    with pytest.raises(ConfigError, match=r"3\.0 GiB free, .* take 4\.0 GiB \(4 of 1\.00 GiB\).*keep_last"):
        check_space(str(run), checkpoints=3, size=2**30)
    held = run / "checkpoints" / "step-00000001" / "model.safetensors"
    held.parent.mkdir(parents=True)
    with held.open("wb") as file:
        file.truncate(2**30)
    check_space(str(run), checkpoints=3, size=2**30)


@pytest.mark.parametrize("lock", ["text", "none"])
def test_the_size_of_a_checkpoint_is_foretold(lock: str, tiny: Make) -> None:
    from helpers.training import prepare_job, run_bare, train_reader

    config = tiny(lock=lock, train__steps=1)
    text = load_text(config.text)
    job = prepare_job(config, text)
    run_bare(job, train_reader(config, text))
    (location,) = list_checkpoints(job.run)
    real = sum(Path(location, f"{part}.safetensors").stat().st_size for part in ("model", "optimizer"))
    assert checkpoint_bytes(config, text) == pytest.approx(real, rel=0.05)

"""A run on several sets: exact resume, the loss and the bad rows of each, and what is refused."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers.gloo import on_ranks
from helpers.training import blocks, prepare_job, run_bare, run_straight_and_stopped, train_reader, weights
from rich.console import Console

from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.paths import with_absolute_paths
from nev.data.block_plan import Segment
from nev.data.index import build_index
from nev.data.mixture import make_mixture
from nev.data.mixture_reader import MixtureReader
from nev.data.windows import make_windows
from nev.models.text import TextTower
from nev.runs.manifest import CheckpointError
from nev.storage.reading import DataError
from nev.train.core.step import Batch
from nev.train.driver.preflight import data_fingerprints
from nev.train.driver.resources import window_bytes
from nev.train.driver.setup import describe_run
from nev.train.experiment import run_experiment
from nev.train.worker.quarantine import Quarantine
from nev.train.worker.set_meters import SetMeters

Make = Callable[..., Experiment]
SHARES = (3, 1)


@pytest.fixture
def mixed(tiny: Make, pictures: Path) -> Make:
    """Makes a small experiment over two sets in shares of 3 and 1."""

    def make(**overrides: Any) -> Experiment:
        paths = (pictures / "train", pictures / "val")
        sets = [{"path": str(path), "weight": weight} for path, weight in zip(paths, SHARES, strict=True)]
        # The small set is the validation set, too: no evaluation.
        settings: dict[str, Any] = {"data__train": sets, "data__val": None, "eval": {}, "data__block_rows": 16}
        return tiny(**settings | overrides)

    return make


def test_a_block_has_the_rows_of_both_sets(mixed: Make, text: TextTower, pictures: Path) -> None:
    config = mixed()
    job, reader = prepare_job(config, text), train_reader(config, text)
    assert isinstance(reader, MixtureReader)
    assert job.set_names == ("train", "val")
    whole = [build_index(str(pictures / name), config.data.columns) for name in job.set_names]
    known = [set(_uids(index)) for index in whole]
    counts: Counter[int] = Counter()
    for block in blocks(reader, job.plan, 0, 6):
        assert block["set"].dtype == np.int16
        counts.update(block["set"].tolist())
        for uid, number, shard in zip(block["uid"], block["set"], block["shard"], strict=True):
            assert uid in known[number]
            assert job.shards[shard].startswith(job.set_names[number] + "/")
    assert abs(counts[0] - 6 * 64 * 0.75) <= whole[0].rows.max()
    # A row of a mixture is that of its set, with the same crop and caption.
    own = reader.readers[1]
    row = Segment(len(whole[0].rows), 3, 9, epoch=2)
    alone = own.decode(own.load([row._replace(group=0)]))
    mixed_rows = own.decode(reader.load([Segment(0, 0, 4), row]))
    for name in ("image", "text", "uid", "row_group"):
        assert (mixed_rows[name][4:] == alone[name]).all()


def _uids(index: Any) -> list[str]:
    return [uid for shard in range(len(index.paths)) for uid in pq.read_table(index.location(shard))["uid"].to_pylist()]


def test_stopped_and_resumed_equals_undisturbed_bit_for_bit(mixed: Make, text: TextTower) -> None:
    straight, stopped = run_straight_and_stopped(mixed(name="whole"), mixed(name="halves"), text, step=7)
    names = ("loss", "sets/train/loss", "sets/val/loss", "sets/train/epochs", "sets/val/epochs")
    for step, metrics in straight.items():
        assert [metrics.get(name) for name in names] == [stopped[step].get(name) for name in names]


def test_the_losses_of_the_sets_are_that_of_the_step(mixed: Make, text: TextTower) -> None:
    config = mixed(train__steps=8)
    job, reader = prepare_job(config, text), train_reader(config, text)
    found = run_bare(job, reader)
    sets = [block["set"] for block in blocks(reader, job.plan, 0, 8)]
    for step, metrics in found.items():
        share = np.bincount(np.concatenate(sets[4 * (step - 1) : 4 * step]), minlength=2) / 64
        losses = [metrics.get(f"sets/{name}/loss", 0.0) for name in job.set_names]
        assert metrics["loss"] == pytest.approx(float(share @ losses), rel=1e-5)
        assert metrics["sets/train/epochs"] == pytest.approx(step * 48 / 1024)
        assert metrics["sets/val/epochs"] == pytest.approx(step * 16 / 128)


def test_a_loss_is_the_mean_since_the_line_before_and_in_parts_the_same(mixed: Make, text: TextTower) -> None:
    each = run_bare(*_prepared(mixed(name="each", train__steps=6), text))
    rare = run_bare(*_prepared(mixed(name="rare", train__steps=6, train__log_every=3, train__micro_batch=16), text))
    assert [step for step, metrics in rare.items() if "sets/val/loss" in metrics] == [3, 6]
    config = mixed(name="each", train__steps=6)
    job, reader = prepare_job(config, text), train_reader(config, text)
    sets = [block["set"] for block in blocks(reader, job.plan, 0, 6)]
    for last in (3, 6):
        steps = range(last - 3, last)
        for number, name in enumerate(job.set_names):
            rows = [sum(int((block == number).sum()) for block in sets[4 * step : 4 * step + 4]) for step in steps]
            losses = [each[step + 1].get(f"sets/{name}/loss", 0.0) for step in steps]
            assert rare[last][f"sets/{name}/loss"] == pytest.approx(float(np.average(losses, weights=rows)), rel=1e-4)


def _prepared(config: Experiment, text: TextTower) -> tuple[Any, Any]:
    return prepare_job(config, text), train_reader(config, text)


def _meters(rank: int) -> dict[str, float]:
    plan = SimpleNamespace(epochs_done=lambda step: (0.5 * step, 2.0 * step, 0.0))
    meters = SetMeters(("a", "b", "never"), plan, torch.device("cpu"), 2)  # type: ignore[arg-type]
    for step in range(2):
        terms = torch.tensor([1.0, 3.0, 100.0, float("nan")]) * (1 + rank) + step
        sets = torch.tensor([0, 1, 1, 0]) if rank else torch.tensor([0, 0, 1, 1])
        batch = Batch(terms, terms, torch.tensor([True, True, False, True]), sets)
        meters.add(batch, SimpleNamespace(terms=terms))  # type: ignore[arg-type]
    return meters.metrics(4)


def test_losses_are_means_over_ranks_and_steps_without_invalid_pairs(tmp_path: Path) -> None:
    found = on_ranks(_meters, 2, tmp_path)
    assert found[0] == found[1]
    # Rank 0: 1, 3 and 2, 4 of a. Rank 1: 2 and 3 of a, 6 and 7 of b.
    epochs = {"sets/a/epochs": 2.0, "sets/b/epochs": 8.0, "sets/never/epochs": 0.0}
    assert found[0] == {"sets/a/loss": 15 / 6, "sets/b/loss": 6.5} | epochs


def test_bad_rows_are_counted_by_set(tmp_path: Path) -> None:
    shards = ("coco/0.parquet", "coco/1.parquet", "cc12m/0.parquet")
    quarantine = Quarantine(str(tmp_path), shards, 0, 0, sets=("coco", "cc12m", "clean"))
    bad = {"valid": np.zeros(3, bool), "uid": np.array(["a", "b", "c"]), "reason": np.array(["no JPEG"] * 3)}
    places = {name: np.zeros(3, np.int32) for name in ("row_group", "row")}
    sets = np.array([0, 0, 1], np.int16)
    quarantine.note(0, {**bad, **places, "shard": np.array([0, 1, 2], np.int32), "set": sets})
    counts = {"sets/coco/bad_rows": 2.0, "sets/cc12m/bad_rows": 1.0, "sets/clean/bad_rows": 0.0}
    assert quarantine.metrics() == counts | {"bad_rows/no_jpeg": 3.0}
    quarantine.flush(1)
    renamed = Quarantine(str(tmp_path), shards, 0, 1, sets=("cc12m", "coco", "clean"))
    assert renamed.metrics() == {
        **counts,
        "sets/cc12m/bad_rows": 2.0,
        "sets/coco/bad_rows": 1.0,
        "bad_rows/no_jpeg": 3.0,
    }


def test_another_share_or_other_columns_are_another_run(mixed: Make, text: TextTower) -> None:
    config = mixed(train__steps=4)
    run_bare(prepare_job(config, text, stop_after=2), train_reader(config, text))
    for weight in ({"weight": None, "epochs": None}, {"weight": None, "epochs": 2}):
        # Shares may be equal, and the length of an epoch is another.
        sets = [{**each.model_dump(), **weight} for each in config.data.train]
        with pytest.raises(CheckpointError, match="fingerprint of the plan"):
            prepare_job(mixed(train__steps=4, data__train=sets), text)
    with pytest.raises(CheckpointError, match="fingerprint of the plan"):
        prepare_job(mixed(train__steps=4, data__train__1__weight=2), text)
    renamed = mixed(train__steps=4, data__train__1__name="other", data__train__0__weight=6, data__train__1__weight=2)
    assert prepare_job(renamed, text).set_names == ("train", "other"), "the same shares, and a name is only for metrics"
    indexes = [build_index(*own) for own in config.data.train_sets]
    before = data_fingerprints(config, indexes)
    indexes[1] = replace(indexes[1], columns=indexes[1].columns.model_copy(update={"caption": "title"}))
    after = data_fingerprints(config, indexes)
    assert before["data_1"] == after["data_1"]
    assert before["data_2"] != after["data_2"]


def test_epochs_are_a_length_and_weights_are_not(mixed: Make, text: TextTower, pictures: Path) -> None:
    paths = [{"path": str(pictures / "train")}, {"path": str(pictures / "val"), "epochs": 4}]
    job = prepare_job(mixed(data__train=paths, train__steps=None, train__epochs=2), text)
    assert job.total_steps == 2 * (1024 + 4 * 128) // 64
    assert job.plan.epochs_done(job.total_steps) == (2.0, 8.0)
    line = describe_run(job, 0, 2**20)
    assert "1,152 rows of 2 sets (train 66.7%, val 33.3%)" in line
    with pytest.raises(ConfigError, match=r"train\.epochs: shares that are weights know no epoch: give train\.steps"):
        mixed(train__steps=None, train__epochs=2)


def test_what_no_mixture_can_be_is_refused(mixed: Make, text: TextTower, pictures: Path) -> None:
    path = str(pictures / "train")
    with pytest.raises(ConfigError, match="give every set a weight, or none"):
        mixed(data__train=[{"path": path, "weight": 1}, {"path": path}])
    with pytest.raises(ConfigError, match=r"a location, or a list of sets, is needed: - \{path: "):
        mixed(data__train={"path": path, "weight": 1})
    with pytest.raises(ConfigError, match=r"data\.train\.2\.weight=3': train is a list of 2, from train\.0 on"):
        mixed(data__train__2__weight=3)
    with pytest.raises(ConfigError, match=r"3 is no set: a location, or \{path: \.\.\., weight: \.\.\.\}, is needed"):
        mixed(data__train=[3, path])
    with pytest.raises(ConfigError, match=r"data\.train\.0\.weight=2': '0' is the value '.*', not a section"):
        mixed(data__train=[path], data__train__0__weight=2)
    with pytest.raises(
        ConfigError, match=r"data\.streams \(2\) needs a number of workers that stays: give workers\.count"
    ):
        mixed(data__streams=2, workers={"min": 2, "max": 4})
    with pytest.raises(ConfigError, match=r"data\.streams \(2\) must divide the 1 workers and the 4 blocks of a step"):
        mixed(data__streams=2, workers={"count": 1})
    with pytest.raises(ConfigError, match=r"the quickstart takes one set, and data\.train is a list"):
        mixed().data.only_set("the quickstart")
    with pytest.raises(ConfigError, match="list one set at least"):
        mixed(data__train=[])
    with pytest.raises(ConfigError, match=r"data\.train\.1\.pth: unknown key; did you mean path\?"):
        mixed(data__train=[{"path": path}, {"path": path, "pth": "x"}])
    with pytest.raises(ConfigError, match="two sets have the name 'a'"):
        mixed(data__train=[{"path": path, "name": "a"}, {"path": path, "name": "a"}])
    with pytest.raises(ConfigError, match=r"text\.center and vision\.standardise take their statistics from one set"):
        mixed(text__center=True)
    with pytest.raises(DataError, match=r"val of data\.train has 128 rows in an epoch, and a step of 256 takes 192"):
        prepare_job(mixed(data__train__1__weight=9, train__global_batch=256), text)
    few = mixed(data__train=[{"path": path, "epochs": 0.01}], train__steps=None, train__epochs=1)
    with pytest.raises(DataError, match=r"data\.train has fewer rows in 1 epoch than a step: raise train\.epochs"):
        prepare_job(few, text)
    with pytest.raises(DataError, match=r"train of data\.train has no row that is used"):
        prepare_job(mixed(data__used_rows=1e-4), text)


def test_streams_divide_workers_and_blocks(mixed: Make) -> None:
    assert mixed(workers__count=4, data__streams=2).data.streams == 2
    for workers in ({"count": 3}, {"count": 1}, {"count": None, "min": 2, "max": 4}):
        with pytest.raises(
            ConfigError, match=r"data\.streams \(2\) (must divide the . workers and the|needs a number of workers)"
        ):
            mixed(workers=workers, data__streams=2, train__global_batch=64 if workers.get("count") != 3 else 192)


def test_sets_are_named_by_what_tells_them_apart(mixed: Make) -> None:
    def names(*paths: str) -> tuple[str, ...]:
        return mixed(data__train=[{"path": path} for path in paths]).data.set_names

    assert names("/data/coco/train", "s3://bucket/cc12m/train") == ("coco", "cc12m")
    assert names("/a/one", "/b/two") == ("one", "two")
    assert names("/a", "/a") == ("set1", "set2")
    assert names("s3://one", "s3://two") == ("one", "two")
    assert names("s3://b/cc12m", "s3://b/coco/{000..117}.tar") == ("cc12m", "coco")
    assert names("/a/{000..099}.tar", "/a/{100..199}.tar") == ("set1", "set2")
    plain = mixed(data__train=["/data/coco", "/data/cc12m"]).data
    assert plain.set_names == ("coco", "cc12m")
    assert plain.factors == (1.0, 1.0)


def test_names_are_those_of_absolute_paths(mixed: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where relative paths hide that two names are one."""
    (tmp_path / "coco").mkdir()
    monkeypatch.chdir(tmp_path / "coco")
    sets = [{"path": "x/train", "name": "coco"}, {"path": "train"}]
    assert mixed(data__train=sets).data.set_names == ("coco", "set2")
    with pytest.raises(ConfigError, match="two sets have the name 'coco'"):
        with_absolute_paths(mixed(data__train=sets))


def test_windows_are_bounded_by_the_row_groups_that_each_set_has_in_them() -> None:
    """Row groups of 10,000 rows beside those of 256, at 100 kB a row: not as if all in a window were large."""
    large, small = (SimpleNamespace(rows=np.full(count, rows)) for count, rows in ((300, 10_000), (12_000, 256)))
    for index in (large, small):
        index.root = "/folder"
        index.nbytes, index.total_rows = index.rows * 100_000, int(index.rows.sum())
    plan = make_mixture([large.rows, small.rows], (1, 1), False, 0, 1024, 256)
    bound = window_bytes([large, small], plan)
    windows = make_windows(plan, 0, 4000)
    read = [sum(100_000 * (stop - start) for _, start, stop, _ in windows[at].segments) for at in range(len(windows))]
    assert max(read) <= bound <= 2 * max(read)


def test_a_mixture_trains_on_a_cluster_and_mlflow_has_its_sets(ray_cluster: None, mixed: Make, text: TextTower) -> None:
    """Two workers, each with a stream of its own."""
    config = mixed(name="cluster", train__steps=6, workers__count=2, data__streams=2)
    summary = run_experiment(config, Console(file=io.StringIO()))
    alone = mixed(name="alone", train__steps=6)
    run_bare(prepare_job(alone, text), train_reader(alone, text))
    ours, theirs = (weights(prepare_job(own, text).run, 6) for own in (config, alone))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)
    assert summary.checkpoint.endswith("step-00000006")
    mlflow.set_tracking_uri(f"sqlite:///{Path(config.output).absolute()}/mlflow.db")
    (run,) = mlflow.search_runs(experiment_names=["nev"], output_format="list")
    assert run.data.metrics["sets/val/epochs"] == pytest.approx(6 * 16 / 128)
    assert {"sets/train/loss", "sets/val/loss", "sets/train/bad_rows"} <= run.data.metrics.keys()
    assert {"nev.data_1_fingerprint", "nev.data_2_fingerprint"} <= run.data.tags.keys()

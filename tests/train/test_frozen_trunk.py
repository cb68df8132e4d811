"""Training behind a locked trunk: from sidecars and online, resumed, on several ranks, and what is refused before it starts."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.frozen import load_trunk, make_frozen, save_trunk, write_features
from helpers.gloo import on_ranks
from helpers.training import blocks, load_train_state, prepare_job, run_bare, weights
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch.multiprocessing.spawn import ProcessExitedException

from nev.common.errors import NevError
from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.paths import with_absolute_paths
from nev.data.block import Block
from nev.data.image_sidecar import Features
from nev.data.index import build_index
from nev.embed.embedder import Embedder
from nev.models.digests import weight_digests
from nev.models.precision import choose_precision
from nev.models.text import TextTower, load_text
from nev.runs.manifest import CheckpointError, latest_checkpoint, read_manifest
from nev.storage.reading import DataError
from nev.train.core.step import Batch
from nev.train.driver.preflight import check_inputs
from nev.train.driver.setup import make_job, make_reader
from nev.train.experiment import run_experiment
from nev.train.worker.loop import TowerMoved, locked_towers, make_trunk_encoder, refuse_moved
from nev.train.worker.state import RankContext

Make = Callable[..., Experiment]
CPU = torch.device("cpu")


@pytest.fixture
def frozen(tiny: Make, tmp_path: Path) -> Make:
    """Makes a small experiment with a locked trunk. The set is copied where sidecars other than the shared ones are written."""
    return functools.partial(make_frozen, tiny, tmp_path)


def bare(config: Experiment, text: TextTower, stop_after: int | None = None) -> dict[int, dict[str, float]]:
    """Train without Ray; the metrics by step."""
    config = with_absolute_paths(config)
    inputs = check_inputs(config, text)
    job = make_job(config, text, inputs, stop_after)
    return run_bare(job, make_reader(config, text, inputs.indexes, inputs.trunk))


def test_online_and_from_sidecars_the_losses_agree(frozen: Make, text: TextTower) -> None:
    settings = {"train__steps": 50, "vision__standardise": True, "data__val": None, "eval": {}, "train__log_every": 1}
    write_features(frozen(**settings))
    sidecar = bare(frozen(name="sidecar", **settings), text)
    online = bare(frozen(name="online", vision__mode="online", **settings), text)
    losses = [[run[step]["loss"] for step in range(1, 51)] for run in (sidecar, online)]
    assert np.abs(np.subtract(*losses)).max() < 1e-3
    assert losses[0][-1] < losses[0][0] - 0.3, "the head learns"


def test_view_v_is_the_view_of_epoch_v_online(frozen: Make, text: TextTower, monkeypatch: pytest.MonkeyPatch) -> None:
    """With augmentation: where each view is taken in its epoch, a run from sidecars is the run online."""
    settings = {"train__epochs": 2, "train__steps": None, "data__augment": {"scale": [0.3, 1.0], "flip": True}}
    settings |= {"data__val": None, "eval": {}}
    write_features(frozen(vision__views=2, **settings))
    monkeypatch.setattr(Features, "draw_views", lambda self, seed, epoch, uids: np.full(len(uids), epoch))
    sidecar = bare(frozen(name="sidecar", vision__views=2, **settings), text)
    online = bare(frozen(name="online", vision__mode="online", **settings), text)
    steps = [step for step in sidecar if "loss" in sidecar[step]]
    assert len(steps) == 32
    assert max(abs(sidecar[step]["loss"] - online[step]["loss"]) for step in steps) < 1e-3


def test_a_checkpoint_holds_the_head_and_names_the_trunk(frozen: Make, text: TextTower) -> None:
    for mode in ("sidecar", "online"):
        config = frozen(name=mode, vision__mode=mode, train__steps=2)
        write_features(config)
        bare(config, text)
        location = str(latest_checkpoint(f"{config.output}/{mode}"))
        assert weights(f"{config.output}/{mode}", 2).keys() == {"log_scale", "vision.head.weight", "vision.head.bias"}
        assert read_manifest(location)["fingerprints"]["trunk"] == load_trunk(config).fingerprint
        assert not Path(location, "trunk.safetensors").exists()


def test_the_whole_tower_comes_from_a_checkpoint_with_its_trunk(frozen: Make, text: TextTower) -> None:
    """`--with-trunk`: the weights of the trunk may be gone. Without, the error says what to do."""
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    vectors = {}
    for name, whole in (("whole", True), ("head", False)):
        config = frozen(name=name, train__steps=2, train__save_trunk=whole)
        write_features(config)
        bare(config, text)
        embedder = Embedder.from_checkpoint(str(latest_checkpoint(f"{config.output}/{name}")))
        vectors[name] = embedder.make_image_embedder(CPU)(images)
    np.testing.assert_array_equal(vectors["whole"], vectors["head"])
    np.testing.assert_allclose(np.linalg.norm(vectors["whole"], axis=1), 1, atol=1e-6)

    moved = Path(str(config.vision.weights)).rename(Path(config.output) / "elsewhere.safetensors")
    embedder = Embedder.from_checkpoint(str(latest_checkpoint(f"{config.output}/whole")))
    np.testing.assert_array_equal(embedder.make_image_embedder(CPU)(images), vectors["whole"])
    location = str(latest_checkpoint(f"{config.output}/head"))
    with pytest.raises(CheckpointError, match=r"needs the locked trunk .* no such file .* --with-trunk"):
        Embedder.from_checkpoint(location).make_image_embedder(CPU)
    there = Embedder.from_checkpoint(location, [f"vision.weights={moved}"])
    np.testing.assert_array_equal(there.make_image_embedder(CPU)(images), vectors["head"])
    state = load_file(moved)
    save_file({**state, "cls_token": state["cls_token"] + 1}, moved)
    with pytest.raises(CheckpointError, match=r"was trained on another trunk \(fingerprint \w{12}\)"):
        there.make_image_embedder(CPU)


DROPOUT = {"vision__head": "mlp", "vision__dropout": 0.3, "vision__views": 3, "vision__standardise": True}
VIEWS = {**DROPOUT, "data__augment": {"scale": [0.5, 1.0]}, "train__steps": 20, "train__eval_every": 10}


def _train_and_die(rank: int, config: Experiment, blocks_before: int) -> None:
    """Train from sidecars until so many blocks are read and a checkpoint is there, then die as by the kernel's hand."""
    text = load_text(config.text)
    inputs = check_inputs(config, text)
    job, reader = make_job(config, text, inputs), make_reader(config, text, inputs.indexes, inputs.trunk)

    def dying() -> Iterator[Block]:
        for number, block in enumerate(blocks(reader, job.plan, 0, job.stop_step)):
            if number == blocks_before:
                while not latest_checkpoint(job.run):  # it is written beside the steps
                    time.sleep(0.05)
                os.kill(os.getpid(), signal.SIGKILL)
            yield block

    run_bare(job, reader, dying())


def test_killed_and_resumed_is_undisturbed_bit_for_bit(frozen: Make, text: TextTower, tmp_path: Path) -> None:
    write_features(frozen(**VIEWS))
    straight, resumed = frozen(name="straight", **VIEWS), frozen(name="resumed", **VIEWS)
    one = bare(straight, text)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        on_ranks(functools.partial(_train_and_die, config=with_absolute_paths(resumed), blocks_before=34), 1, tmp_path)
    assert latest_checkpoint(f"{resumed.output}/resumed")
    assert not Path(resumed.output, "resumed/checkpoints/step-00000020").exists()
    other = bare(resumed, text)
    assert all(other[step]["loss"] == one[step]["loss"] for step in other if "loss" in other[step])
    assert one[20]["retrieval/text_to_image/r10"] == other[20]["retrieval/text_to_image/r10"]
    runs = [weights(f"{config.output}/{config.name}", 20) for config in (straight, resumed)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def _trains(rank: int, config: Experiment, world: int) -> dict[str, Any]:
    text = load_text(config.text)
    job = prepare_job(config, text)
    index = build_index(config.data.train, config.data.columns)
    reader = make_reader(config, text, [index], check_inputs(config, text).trunk)
    metrics = run_bare(job, reader, rank=rank, world=world)
    return {"losses": [metrics[step]["loss"] for step in sorted(metrics)] if rank == 0 else []}


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "fsdp"), [("sidecar", True), ("online", False)])
def test_two_ranks_are_one_process(frozen: Make, text: TextTower, tmp_path: Path, mode: str, fsdp: bool) -> None:
    settings = {"vision__mode": mode, "vision__pool": "map", "vision__keep": "tokens", "train__steps": 4}
    settings |= {"train__micro_batch": 16, "data__val": None, "eval": {}}
    write_features(frozen(**settings))
    alone = frozen(name="alone", **settings)
    expected = bare(alone, text)
    both = with_absolute_paths(frozen(name="both", workers__count=2, train__fsdp=fsdp, **settings))
    losses = on_ranks(functools.partial(_trains, config=both, world=2), 2, tmp_path)[0]["losses"]
    np.testing.assert_allclose(losses, [expected[step]["loss"] for step in range(1, 5)], rtol=1e-5)
    one, two = (weights(f"{alone.output}/{name}", 4) for name in ("alone", "both"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(
            two[name], tensor, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_text_in_the_loop_beside_image_sidecars(frozen: Make, text: TextTower) -> None:
    settings = {"train__steps": 3, "data__val": None, "eval": {}}
    write_features(frozen(**settings))
    sidecars = bare(frozen(name="sidecars", **settings), text)
    online = bare(frozen(name="online", text__mode="online", **settings), text)
    assert [online[step]["loss"] for step in (1, 2, 3)] == pytest.approx(
        [sidecars[step]["loss"] for step in (1, 2, 3)], abs=1e-3
    )


@pytest.mark.parametrize("loss", [{"kind": "sigmoid", "init_scale": 10}, {"matryoshka": {"64": 1, "384": 1}}])
def test_other_losses(frozen: Make, text: TextTower, loss: dict[str, Any]) -> None:
    config = frozen(train__steps=8, loss=loss, data__val=None, eval={})
    write_features(config)
    metrics = bare(config, text)
    assert metrics[8]["loss"] < metrics[1]["loss"]


def test_a_feature_beyond_float16_leaves_its_row_out(frozen: Make) -> None:
    config = frozen(vision__mode="online")
    trunk = load_trunk(config)
    trunk.pool = torch.nn.Module()
    trunk.pool.forward = lambda tokens: torch.tensor([[1.0], [1e9], [2.0]])  # type: ignore[method-assign]
    batch = Batch(torch.zeros(3, 32, 32, 3, dtype=torch.uint8), torch.zeros(3, 4), torch.tensor([True, True, False]))
    found = make_trunk_encoder(trunk, config, CPU)(batch)
    assert found.valid.tolist() == [True, False, False]
    assert found.images.tolist() == [[1.0], [0.0], [0.0]]


def test_a_trunk_that_moves_in_the_loop_ends_the_run(frozen: Make, text: TextTower) -> None:
    config = with_absolute_paths(frozen(vision__mode="online", data__val=None, eval={}))
    job = prepare_job(config, text)
    train_state, _ = load_train_state(job, RankContext(0, 1, CPU, choose_precision("fp32", CPU)))
    locked = {name: (tower, weight_digests(tower)) for name, tower in locked_towers(train_state, config).items()}
    assert locked.keys() == {"trunk"}
    refuse_moved(locked, 1)
    with torch.no_grad():
        train_state.trunk.trunk.cls_token += 1
    with pytest.raises(TowerMoved, match=r"the trunk is locked, but 1 of its \d+ weights changed \(cls_token\)"):
        refuse_moved(locked, 1)


def test_what_is_refused_before_work_starts(frozen: Make, text: TextTower, tmp_path: Path, pictures: Path) -> None:
    def refused(error: type[Exception], message: str, **settings: object) -> None:
        with pytest.raises(error, match=message):
            check_inputs(with_absolute_paths(frozen(**settings)), text)

    shutil.copytree(pictures, tmp_path / "set", ignore=shutil.ignore_patterns("_image"))
    here = {"data__train": str(tmp_path / "set/train"), "data__val": str(tmp_path / "set/val")}
    nothing = r"shards have no image sidecar of this trunk and view \(first: .*nev embed-images --config CONFIG"
    refused(NevError, nothing, **here)
    write_features(with_absolute_paths(frozen(**here)))
    check_inputs(with_absolute_paths(frozen(**here)), text)
    refused(NevError, "sidecars of others: .*trunk .* there", **here, vision__weights=save_trunk(tmp_path, 1))
    refused(DataError, r"\"scale\"", **here, data__augment={"scale": [0.1, 1.0]}, vision__views=2)
    statistics = {"vision__mode": "online", "vision__standardise": True}
    refused(DataError, r"or set vision\.standardise=false", **here, **statistics, data__augment={"scale": [0.1, 1.0]})
    refused(ConfigError, r"this machine has", **here, vision__head="mlp", vision__head_hidden=10**10)
    refused(ConfigError, "no such file of weights", **here, vision__weights="absent.safetensors")
    with pytest.raises(ConfigError, match=r"vision\.lock: trunk trains a head into the space of a locked text tower"):
        frozen(lock="none")
    for message, settings in {
        "would keep one view 2 times": {"vision__views": 2},
        "would keep one random crop": {"data__augment": {"flip": True}},
        "are for a trunk that is trained": {"train__compile": True},
    }.items():
        with pytest.raises(ConfigError, match=message):
            frozen(**settings)


def test_a_run_continues_on_its_trunk_alone(frozen: Make, text: TextTower, tmp_path: Path) -> None:
    config = frozen(train__steps=2, data__val=None, eval={})
    write_features(config)
    bare(config, text)
    copy = tmp_path / "copy.safetensors"
    shutil.copy(str(config.vision.weights), copy)
    longer = {"train__steps": 2, "data__val": None, "eval": {}}
    check_inputs(with_absolute_paths(frozen(**longer, vision__weights=str(copy))), text)  # the same weights elsewhere
    other = frozen(**longer, vision__weights=save_trunk(tmp_path, 2))
    write_features(other)
    with pytest.raises(CheckpointError, match=r"fingerprint of the trunk: \w{12} there, \w{12} here"):
        check_inputs(with_absolute_paths(other), text)


@pytest.mark.ray
def test_a_run_on_ray_validates_beside_training_and_is_evaluated(
    frozen: Make, ray_cluster: None, text: TextTower
) -> None:
    """From embed-images to the report: validation by the driver, pictures of the report, another evaluation."""
    from nev.embed.features import embed_features
    from nev.eval.evaluate import evaluate_checkpoint

    settings = {"train__steps": 20, "train__eval_every": 10, "eval__asynchronous": True}
    config = with_absolute_paths(frozen(name="ray", vision__standardise=True, **settings))
    quiet = Console(quiet=True)
    embed_features(config, quiet)
    assert embed_features(config, quiet).shards == 0, "what is there is not written again"
    summary = run_experiment(config, quiet)
    bare(frozen(name="straight", vision__standardise=True, **settings), text)
    found = weights(f"{config.output}/ray", 20)
    straight = weights(f"{config.output}/straight", 20)
    assert all(torch.equal(found[name], tensor) for name, tensor in straight.items()), "Ray changes no bit"
    assert summary.report
    assert summary.metrics["retrieval/text_to_image/r10"] > 0.1
    # Pixels through the whole tower give what the features of the sidecars gave.
    _, metrics, _ = evaluate_checkpoint(summary.checkpoint, [f"data.val={config.data.val}"], quiet)
    assert metrics["retrieval/text_to_image/r10"] == pytest.approx(
        summary.metrics["retrieval/text_to_image/r10"], abs=0.02
    )

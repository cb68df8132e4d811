"""The memory of a step, told beforehand: against what is alive in a real one, byte by byte, and against a process's peak."""

import functools
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed._functional_collectives as funcol
from helpers.gloo import on_ranks
from helpers.memory import CPU, WIDTH, experiment, one_step, real
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from nev.commands.main import make_pipeline
from nev.config.base import ConfigError
from nev.config.file import to_yaml
from nev.models.dual_encoder import DualEncoder
from nev.models.precision import choose_precision
from nev.models.vision import build_vision
from nev.train.capacity import STOP, LiveBytes, collectives, compute_shape, estimate_memory, measure_activations
from nev.train.core.optim import make_optimizer
from nev.train.core.parallel import distribute
from nev.train.core.step import Batch, train_step


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"train": {"micro_batch": 16}},
        {"train": {"activation_checkpointing": True}},
        {"train": {"precision": "bf16"}},
        {"batch": 2048, "train": {"micro_batch": 16}},
        {"batch": 1024, "train": {"micro_batch": 16}, "loss": {"kind": "sigmoid"}},
        {"batch": 1024, "train": {"micro_batch": 16}, "loss": {"matryoshka": {8: 1.0, 16: 1.0, WIDTH: 1.0}}},
        {"vision": {"trunk": "eva02_tiny_patch14_224", "trunk_args": {"patch_size": 8, "depth": 3}, "pool": "nomic"}},
    ],
    ids=["whole", "in parts", "few activations", "bf16", "large", "large sigmoid", "large nested", "eva02"],
)
def test_the_peak_is_what_is_alive_in_a_real_step(sections: dict[str, Any]) -> None:
    config = experiment(**sections)
    live = LiveBytes()
    one_step(config, live)
    told = estimate_memory(config, WIDTH, bf16=config.train.precision == "bf16")
    assert told.alive == pytest.approx(live.peak, rel=0.1)


def test_nothing_is_allocated_and_a_large_tower_is_told_in_seconds() -> None:
    config = experiment(
        batch=65536,
        vision={"trunk": "vit_large_patch16_224", "pool": "map"},
        data={"train": "nowhere", "image_size": 224, "block_rows": 256},
        train={"micro_batch": 256},
        workers={"count": 16},
    )
    told = estimate_memory(config, 768, bf16=True, gpu=True)
    parameters = 303e6
    assert told.weights == pytest.approx(4 * parameters, rel=0.1)
    assert told.optimiser == pytest.approx(2 * told.weights, rel=0.01)
    assert told.images == 4096 * 224 * 224 * 3
    assert told.peak > told.weights + told.gradients + told.optimiser + told.images


def test_the_parts_follow_the_settings() -> None:
    small, large = (estimate_memory(experiment(batch=512, train={"micro_batch": part}), WIDTH) for part in (16, 128))
    assert small.activations < large.activations / 6
    assert small.images == large.images
    few = estimate_memory(experiment(train={"activation_checkpointing": True}), WIDTH)
    assert few.activations < estimate_memory(experiment(), WIDTH).activations / 2


RSS = """
import sys
from collections import Counter
from pathlib import Path
sys.path[:0] = [{tests!r}]
from helpers.memory import experiment, one_step, real

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

one_step(experiment(batch=16))  # the process, its threads and its libraries
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
one_step(real())
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
def test_the_peak_of_a_process_is_within_15_percent() -> None:
    code = RSS.format(tests=str(Path(__file__).parents[1]))
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert estimate_memory(real(), WIDTH).peak == pytest.approx(int(done.stdout), rel=0.15)


def test_what_is_said_between_ranks() -> None:
    assert collectives(experiment(), WIDTH) == []
    learned = sum(p.nbytes for p in build_vision(experiment().vision, 32, WIDTH).parameters())
    said = collectives(experiment(batch=64, workers={"count": 4}), WIDTH)
    assert [(one.kind, one.count, one.nbytes) for one in said] == [
        ("all_gather", 1, 64 * (WIDTH + 1) * 2),
        ("all_reduce", 2, (2 * 64 + 2) * 4),
        ("all_reduce", 1, 1),
        ("all_reduce", 1, learned),
    ]
    sigmoid = collectives(experiment(workers={"count": 4}, loss={"kind": "sigmoid"}), WIDTH)
    assert [one.nbytes for one in sigmoid[1:]] == [8, 1, learned]


class Counting(TorchDispatchMode):
    """The collectives and the bytes of their larger side, as they are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.nbytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function.overloadpacket.__name__
            self.seen[name] += 1
            leaves = ([leaf for leaf in tree_leaves(side) if isinstance(leaf, torch.Tensor)] for side in args)
            self.nbytes[name] += max(sum(leaf.nbytes for leaf in side) for side in leaves)
        return function(*args, **(kwargs or {}))


def _splits(rank: int, train: dict[str, Any]) -> dict[str, Any]:
    config = experiment(batch=64, workers={"count": 2}, train=train)
    model = DualEncoder(build_vision(config.vision, 32, WIDTH), config.loss, bias=config.initial_bias).train()
    wrapped = distribute(model, True, 2, CPU)
    optimizer = make_optimizer(model, config.optim)
    given = Batch(
        torch.zeros(32, 32, 32, 3, dtype=torch.uint8),
        normalize(torch.randn(32, WIDTH)).half(),
        torch.ones(32, dtype=torch.bool),
    )
    functional, through = 0, funcol.all_reduce  # DTensor's way, which no dispatch mode sees

    def counting(*args: Any, **more: Any) -> Any:
        nonlocal functional
        functional += 1
        return through(*args, **more)

    with Counting() as counted, mock.patch.object(funcol, "all_reduce", counting):
        train_step(wrapped, optimizer, given, config, choose_precision("fp32", CPU))
    counted.seen["allreduce_"] += functional
    return {"seen": dict(counted.seen), "nbytes": dict(counted.nbytes)}


@pytest.mark.slow
@pytest.mark.parametrize("train", [{"fsdp": True}, {"fsdp": True, "micro_batch": 8}])
def test_what_fsdp_says_is_what_it_says(train: dict[str, Any], tmp_path: Path) -> None:
    found = on_ranks(functools.partial(_splits, train=train), 2, tmp_path)[0]
    told = collectives(experiment(batch=64, workers={"count": 2}, train=train), WIDTH)
    for kind, name in (("all_gather", "_allgather_base_"), ("reduce_scatter", "_reduce_scatter_base_")):
        ours = [one for one in told if one.kind == kind]
        assert found["seen"][name] == sum(one.count for one in ours)
        assert found["nbytes"][name] == pytest.approx(
            sum(one.nbytes for one in ours), rel=0.02
        )  # uneven rows are padded
    of_the_step = [
        one for one in told if one.kind == "all_reduce" and one.purpose != STOP
    ]  # the loop calls it, not the step
    assert found["seen"]["allreduce_"] == sum(one.count for one in of_the_step)


def test_fsdp_holds_a_share_and_what_is_gathered() -> None:
    whole, split = (
        estimate_memory(experiment(workers={"count": 4}, train={"fsdp": fsdp, "micro_batch": 16}), WIDTH)
        for fsdp in (False, True)
    )
    for name in ("weights", "gradients", "optimiser"):
        assert getattr(split, name) == pytest.approx(getattr(whole, name) / 4, rel=0.01)
    blocks, rest = measure_activations(compute_shape(experiment(), WIDTH))
    assert len(blocks) == 4
    assert sum(blocks) + rest == whole.gradients
    assert (whole.gathered, split.gathered) == (0, rest + 3 * max(blocks))


def test_a_text_tower_in_the_loop_is_not_told() -> None:
    with pytest.raises(ConfigError, match="text tower in the loop cannot be computed"):
        estimate_memory(experiment(lock="none"), WIDTH)


def test_the_command_prints_a_table(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(to_yaml(experiment(workers={"count": 4})))
    done = CliRunner().invoke(make_pipeline("capacity"), ["--config", str(tmp_path / "x.yaml"), "--width", "48"])
    assert done.exit_code == 0, done.output
    for word in ("activations", "peak", "all_gather", "gradients (DDP)"):
        assert word in done.output

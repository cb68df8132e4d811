"""The benchmarks of losses, steps and memory: what they report, and that what they measure is real."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import capacity, loss, loss_gpu, step, step_gpu
from benchmarks.contestants import collectives, losses, open_clip, processes, steps
from nev.common.errors import NevError
from nev.config.experiment import Experiment
from nev.losses import contrastive, tiles

REPO = Path(__file__).parents[2]


def test_loss_reports_its_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`loss` with contestants that answer at once: nev 2 s and 10 MiB, open_clip 8 s and 400 MiB, a product at 1 GFLOP/s."""

    def answer(contestant: object, *args: object) -> object:
        if contestant is losses.cost:
            return losses.LossCost(2.0, 10.0, 1e9) if args[0] == "nev" else losses.LossCost(8.0, 400.0, 0.0)
        return 1e-7

    monkeypatch.setattr(processes, "in_own_process", answer)

    def sent(name: str, world: int, rows: int, width: int, locked: bool) -> collectives.Traffic:
        assert (world, rows, width) == (4, 512, 64)
        return collectives.Traffic(3, (1.0 if name == "nev" else 4.0) * (1 if locked else 2))

    monkeypatch.setattr(collectives, "traffic", sent)
    monkeypatch.setattr(open_clip, "not_installed", list)
    loss.main(width=64, sizes=[1024, 2048], alone=[4096], narrow=[8192], repetitions=2, results=tmp_path)
    written = json.loads((tmp_path / "loss.json").read_text())
    assert written["ratios"]["time_vs_open_clip_2048"] == 0.25
    assert written["ratios"]["memory_vs_open_clip_1024"] == 0.025
    assert written["ratios"]["flops_vs_gemm"] == pytest.approx(6 * 2048**2 * 64 / 2 / 1e9, rel=1e-3)
    assert written["figures"]["nev_4096_s"] == written["figures"]["nev_8192_d32_s"] == 2.0
    assert written["figures"]["gradient_difference"] == 1e-7
    assert written["ratios"]["sent_vs_open_clip"] == written["ratios"]["unlocked_sent_vs_open_clip"] == 0.25
    assert written["figures"]["open_clip_unlocked_sent_mib"] == 8.0


def test_loss_gpu_reports_its_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`loss_gpu` with ways that answer at once: the kernels 0.5 s and 100 MiB, the tiles 2 s and 400 MiB."""
    answers = {"kernels": (0.5, 100.0), "tiles": (2.0, 400.0)}
    monkeypatch.setattr(loss_gpu, "require_gpu", lambda: None)
    monkeypatch.setattr(loss_gpu, "cost", lambda way, n, width: answers[way])
    monkeypatch.setattr(loss_gpu, "gradient_error", lambda way, n, width: 1e-6 * n)
    loss_gpu.main(width=64, rows=[2048, 1024], repetitions=2, results=tmp_path)
    written = json.loads((tmp_path / "loss_gpu.json").read_text())
    assert written["ratios"] == {f"{kind}_vs_tiles_{n}": 0.25 for n in (2048, 1024) for kind in ("time", "memory")}
    assert written["figures"]["kernels_2048_ms"] == 500
    assert written["figures"]["tiles_1024_tflop_per_s"] == pytest.approx(6 * 1024**2 * 64 / 2e12, rel=1e-3)
    assert written["figures"]["kernels_gradient_error"] == pytest.approx(1.024e-3)


def test_loss_gpu_holds_either_way_against_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Walks:
        """What the kernels would be: the tiles."""

        def __getattr__(self, name: str) -> object:
            calls.append(name)
            return getattr(tiles, name)

    monkeypatch.setattr(contrastive, "fused", Walks())
    monkeypatch.setattr(loss_gpu, "pairs", losses.pairs)
    assert 1e-9 < loss_gpu.gradient_error("tiles", 64, 16) < 1e-6
    assert calls == []
    assert 1e-9 < loss_gpu.gradient_error("kernels", 64, 16) < 1e-6
    assert calls == ["statistics", "gradient"], "of the images; float64 is the tiles'"


def test_loss_gpu_says_what_it_lacks() -> None:
    """And it needs little: no Ray, and nothing of what trains."""
    code = (
        "import sys\n"
        "for name in ('ray', 'timm', 'transformers', 'pyarrow', 'mlflow', 'numpy', 'yaml'):\n"
        "    sys.modules[name] = None\n"
        "import torch; torch.cuda.is_available = lambda: False\n"
        "from benchmarks.loss_gpu import app; app([])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 2
    assert "needs an NVIDIA GPU" in done.stderr


def test_step_gpu_reports_its_share_of_the_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`step_gpu` with steps that answer at once, on a device of 200 TFLOP/s."""
    asked = []

    def answer(config: Experiment, device: str) -> tuple[float, float]:
        asked.append((config.train.global_batch, config.train.micro_batch, config.train.compile, device))
        return (1000.0 if config.train.compile else 800.0) * (1 if config.train.global_batch == 4 else 0.7), 5.0

    monkeypatch.setattr(step_gpu, "images_per_s", answer)
    monkeypatch.setattr(step_gpu, "device_name", lambda: "NVIDIA A9000")
    with pytest.raises(NevError, match="the peak of NVIDIA A9000 is not known here"):
        step_gpu.peak_of("NVIDIA A9000")
    step_gpu.main(part=4, parts=2, repetitions=1, peak=200.0, results=tmp_path)
    assert asked == [(batch, 4, compiled, "cuda") for compiled in (False, True) for batch in (4, 8)]
    written = json.loads((tmp_path / "step_gpu.json").read_text())
    assert written["figures"]["gflop_an_image"] == pytest.approx(106.6, rel=0.01)  # three times 17.8 G multiply-adds
    assert written["ratios"]["mfu"] == pytest.approx(1000 * 106.6e9 / 200e12, rel=0.01)
    assert written["ratios"]["gradcache_rate"] == pytest.approx(0.7)
    assert written["ratios"]["compile_speedup"] == pytest.approx(1.25)
    assert step_gpu.peak_of("NVIDIA H100 80GB HBM3") == 989


def test_step_gpu_takes_real_steps() -> None:
    config = step_gpu.experiment(4, 2, compiled=False)
    trunk = config.vision.trunk_args | {"depth": 1, "embed_dim": 96, "num_heads": 2}
    vision = config.vision.model_copy(update={"trunk_args": trunk, "pool_heads": 2})
    config = config.model_copy(update={"vision": vision, "data": config.data.model_copy(update={"image_size": 32})})
    rate, mib = step_gpu.images_per_s(config, "cpu", warm=1, timed=1)
    assert rate > 0
    assert mib == 0


@pytest.mark.slow
@pytest.mark.parametrize("locked", [True, False])
def test_what_a_loss_sends_is_counted(locked: bool) -> None:
    found = collectives.traffic("nev", 2, 8, 16, locked)
    texts = 16 * 17 * (2 if locked else 4)  # N (D + 1) numbers, half of them from each rank
    columns = 2 * 4 * (16 + 18)  # N in one all-reduce, N + 2 in the next
    gradient = 0 if locked else 4 * 16 * 16
    assert found.collectives == (3 if locked else 4)
    assert found.mib * 2**20 == (texts + columns + gradient) / 2


def test_capacity_reports_what_was_told_over_what_was_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(contestant: object, config: Experiment, count: int) -> losses.Cost:
        assert contestant is steps.cost_of
        return losses.Cost(1.0, 1000.0)

    monkeypatch.setattr(processes, "in_own_process", answer)
    monkeypatch.setattr(capacity, "SETTINGS", {"narrow": (capacity.NARROW, 32, 64, {"micro_batch": 32})})
    capacity.main(repetitions=1, results=tmp_path)
    written = json.loads((tmp_path / "capacity.json").read_text())
    assert written["ratios"]["told_vs_measured_narrow"] == pytest.approx(written["figures"]["narrow_told_mib"] / 1000)


def test_step_reports_its_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`step` with contestants that answer at once: in parts 8 s and 110 MiB, plain 6 s and 100 MiB."""

    def answer(contestant: object, images: int, batch: int, part: int) -> losses.Cost:
        assert (contestant, images, part) == (steps.cost, 512, 64)
        return {512: losses.Cost(8.0, 110.0), 64: losses.Cost(6.0, 100.0)}[batch]

    monkeypatch.setattr(processes, "in_own_process", answer)
    step.main(batch=512, part=64, repetitions=2, results=tmp_path)
    written = json.loads((tmp_path / "step.json").read_text())
    assert written["ratios"] == {"gradcache_memory": 1.1, "gradcache_time": pytest.approx(4 / 3, rel=1e-4)}


@pytest.mark.slow
def test_a_step_in_parts_costs_time_and_memory() -> None:
    seconds, mib = processes.in_own_process(steps.cost, 64, 64, 32)
    assert seconds > 0
    assert 20 < mib < 1500


@pytest.mark.slow
def test_a_loss_costs_time_and_memory() -> None:
    seconds, mib, flops = processes.in_own_process(losses.cost, "nev", 2048, 16, True)
    assert seconds > 0
    assert 0 < mib < 200
    assert flops > 1e6


@pytest.mark.slow
def test_the_search_of_the_evaluation_counts_what_it_takes() -> None:
    from benchmarks.contestants.embedding import search
    from benchmarks.contestants.processes import in_own_process

    found = in_own_process(search, 3000, 16)
    assert found.seconds > 0
    assert 0 <= found.gib < 1

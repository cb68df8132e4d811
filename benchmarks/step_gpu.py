"""A training step of the paper's tower on an NVIDIA GPU: images/s and share of its peak, whole and in parts, compiled or not.

make bench NAME=step_gpu
python benchmarks/step_gpu.py --part 512 --parts 8 --repetitions 2

It needs torch, timm, pydantic, PyYAML, rich and typer; no Ray, no data, no weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import report
from nev.common.cli import make_command, report_errors
from nev.common.errors import NevError
from nev.config.experiment import Experiment
from nev.config.file import load

CONFIG = Path(__file__).parents[1] / "configs/nomic_embed_vision_v1_5.yaml"
WIDTH = 768
MFU_GOAL = 0.5
# Dense bf16 TFLOP/s by the makers' data sheets; the first name that the device's holds.
PEAKS = {"H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "A10": 125.0}
NOTES = (
    "EVA02-B/16 with nomic's head at 224 px, random weights, made-up images that are on the device; bf16 autocast, float32 "
    "weights, fused AdamW, InfoNCE over the batch, texts fp16 and locked, one process. After three steps, ten are timed.",
    "mfu: FLOPs of a forward and backward of the tower (counted by torch, 2 a multiply-add) times images/s, over the device's "
    "dense bf16 peak. The second forward of parts, and what activation checkpointing computes again, is not counted.",
)


def main(
    part: Annotated[int, typer.Option(min=1, help="Images embedded at a time.")] = 512,
    parts: Annotated[int, typer.Option(min=2, help="Parts of the batch that is embedded in parts.")] = 8,
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds; each contestant runs once in each.")] = 3,
    peak: Annotated[
        float | None, typer.Option(help="The device's dense bf16 TFLOP/s, if it is not known here.")
    ] = None,
    results: Annotated[
        Path, typer.Option(help="Folder of step_gpu.json.", show_default="benchmarks/results")
    ] = report.RESULTS,
) -> None:
    """Measure training steps on a GPU; writes benchmarks/results/step_gpu.json."""
    console = Console()
    with report_errors():
        most = (peak or peak_of(device_name())) * 1e12
        flops = flops_of_an_image(experiment(1, 1, compiled=False))
        beside: dict[str, list[float]] = {"gflop_an_image": [flops / 1e9]}

        def rate(name: str, config: Experiment) -> float:
            found, mib = images_per_s(config, "cuda")
            beside.setdefault(f"{name}_mib", []).append(mib)
            beside.setdefault(f"{name}_mfu", []).append(found * flops / most)
            return found

        contestants: dict[str, Callable[[], float]] = {}
        for compiled in (False, True):
            name = "compiled" if compiled else "eager"
            for batch, way in ((part, "whole"), (part * parts, "parts")):
                config = experiment(batch, part, compiled)
                contestants[f"{way}_{name}_images_per_s"] = partial(rate, f"{way}_{name}", config)
        figures = report.measure_interleaved(contestants, repetitions, console) | beside
        whole = zip(*(figures[f"whole_{name}_images_per_s"] for name in ("eager", "compiled")), strict=True)
        figures["faster_flop_per_s"] = [max(rates) * flops for rates in whole]
        figures["peak_flop_per_s"] = [most] * repetitions
        ratios = {
            "mfu": report.Ratio("faster_flop_per_s", "peak_flop_per_s", MFU_GOAL),
            "gradcache_rate": report.Ratio("parts_compiled_images_per_s", "whole_compiled_images_per_s", 3 / 4),
            "compile_speedup": report.Ratio("whole_compiled_images_per_s", "whole_eager_images_per_s"),
        }
        report.write("step_gpu", report.this_command(), figures, ratios, NOTES, results, console)


def experiment(batch: int, part: int, compiled: bool) -> Experiment:
    """The paper's recipe at another batch, without its weights."""
    settings: dict[str, Any] = {
        "vision.pretrained": "false",
        "data.block_rows": batch,
        "train.global_batch": batch,
        "train.micro_batch": part,
        "train.epochs": "null",
        "train.steps": 1,
        "train.compile": str(compiled).lower(),
        "workers.count": 1,
    }
    return load(CONFIG, [f"{name}={value}" for name, value in settings.items()])


def device_name() -> str:
    """Raise NevError where torch sees no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise NevError("this benchmark needs an NVIDIA GPU, and torch sees none: `make bench NAME=step` measures a CPU")
    return torch.cuda.get_device_name()


def peak_of(device: str) -> float:
    """Its dense bf16 TFLOP/s."""
    for name, tflops in PEAKS.items():
        if name in device:
            return tflops
    raise NevError(f"the peak of {device} is not known here: give its dense bf16 TFLOP/s with --peak")


def flops_of_an_image(config: Experiment) -> int:
    """FLOPs of the tower's forward and backward for one image, counted on tensors without memory."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from nev.models.vision import build_vision

    size = config.data.image_size
    with torch.device("meta"):
        vision = build_vision(config.vision, size, WIDTH)
        pixels = torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter:
        vision(pixels).sum().backward()
    return int(counter.get_total_flops())


def images_per_s(config: Experiment, device_name: str, warm: int = 3, timed: int = 10) -> tuple[float, float]:
    """(images/s of training steps, the most MiB that were allocated)."""
    import torch

    from nev.models.dual_encoder import DualEncoder
    from nev.models.precision import choose_precision
    from nev.models.vision import build_vision
    from nev.train.core.optim import make_optimizer
    from nev.train.core.step import Batch, train_step
    from nev.train.core.vision_setup import apply_train_options

    device, batch, size = torch.device(device_name), config.train.global_batch, config.data.image_size
    on_gpu = device.type == "cuda"
    torch._dynamo.reset()  # what the contestant before compiled counts against a limit
    torch.manual_seed(0)
    vision = build_vision(config.vision, size, WIDTH)
    apply_train_options(vision, config.train)
    model = DualEncoder(vision, config.loss).to(device).train()
    optimizer = make_optimizer(model, config.optim)
    given = Batch(
        torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=device),
        torch.nn.functional.normalize(torch.randn(batch, WIDTH, device=device)).half(),
        torch.ones(batch, dtype=torch.bool, device=device),
    )
    precision = choose_precision("bf16", device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    begin = 0.0
    for step in range(warm + timed):
        if step == warm:
            torch.cuda.synchronize() if on_gpu else None
            begin = time.perf_counter()
        train_step(model, optimizer, given, config, precision)
    torch.cuda.synchronize() if on_gpu else None
    seconds = time.perf_counter() - begin
    return timed * batch / seconds, torch.cuda.max_memory_allocated() / 2**20 if on_gpu else 0.0


app = make_command(main, "make bench NAME=step_gpu")

if __name__ == "__main__":
    app()

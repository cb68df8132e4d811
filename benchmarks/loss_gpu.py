"""The contrastive loss on an NVIDIA GPU: the Triton kernels beside PyTorch's operations on tiles.

make bench NAME=loss_gpu
python benchmarks/loss_gpu.py --rows 65536 --repetitions 3

It needs torch, rich and typer (with what typer needs), none of the rest of nev's dependencies.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from benchmarks import report
from nev.common.cli import make_command, report_errors
from nev.common.errors import NevError

if TYPE_CHECKING:
    from torch import Tensor

NOTES = (
    "Forward and backward of the loss of a process alone: images float32, texts fp16 and locked, D numbers each. All in one "
    "process, after a small loss that compiles what there is to compile.",
    "ms: until the device is done. mib: most memory above what the inputs take. tflop_per_s: the three matrix products that the "
    "loss is, 6 N^2 D, over its seconds; the kernels multiply the two halves of a float32 number apart, which is not counted.",
    "gradient_error: largest difference from the tiles in float64, over the largest gradient, at the least N.",
)
WARM_UP = 4096


def main(
    width: Annotated[int, typer.Option(min=16, help="D, numbers of a vector.")] = 768,
    rows: Annotated[
        list[int] | None, typer.Option(min=256, help="N. May be repeated.  [default: 65536, 1048576]")
    ] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds; either way runs once in each.")] = 3,
    tf32: Annotated[bool, typer.Option(help="Let either way multiply in TF32.")] = False,
    results: Annotated[
        Path, typer.Option(help="Folder of loss_gpu.json.", show_default="benchmarks/results")
    ] = report.RESULTS,
) -> None:
    """Measure the loss's two ways on a GPU; writes benchmarks/results/loss_gpu.json."""
    import torch

    console = Console()
    with report_errors():
        require_gpu()
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        beside: dict[str, list[float]] = {}

        def milliseconds(way: str, n: int) -> float:
            seconds, mib = cost(way, n, width)
            beside.setdefault(f"{way}_{n}_mib", []).append(mib)
            beside.setdefault(f"{way}_{n}_tflop_per_s", []).append(6 * n**2 * width / seconds / 1e12)
            return 1000 * seconds

        rows = rows or [65_536, 1_048_576]
        contestants: dict[str, Callable[[], float]] = {}
        ratios: dict[str, report.Ratio] = {}
        for n in rows:
            contestants |= {f"{way}_{n}_ms": partial(milliseconds, way, n) for way in ("kernels", "tiles")}
            ratios[f"time_vs_tiles_{n}"] = report.Ratio(f"kernels_{n}_ms", f"tiles_{n}_ms", at_most=True)
            ratios[f"memory_vs_tiles_{n}"] = report.Ratio(f"kernels_{n}_mib", f"tiles_{n}_mib", at_most=True)
        for way in ("kernels", "tiles"):
            cost(way, WARM_UP, width)
        figures = report.measure_interleaved(contestants, repetitions, console) | beside
        figures |= {f"{way}_gradient_error": [gradient_error(way, min(rows), width)] for way in ("kernels", "tiles")}
        report.write("loss_gpu", report.this_command(), figures, ratios, NOTES, results, console)


def require_gpu() -> None:
    """Raise NevError where there is no GPU that the kernels run on."""
    import torch

    from nev.losses import fused

    if not torch.cuda.is_available():
        raise NevError("this benchmark needs an NVIDIA GPU, and torch sees none: `make bench NAME=loss` measures a CPU")
    if reason := fused.unsupported_reason(torch.device("cuda")):
        raise NevError(f"the kernels cannot run here: {reason}")


def cost(way: str, n: int, width: int) -> tuple[float, float]:
    """(seconds, MiB above the inputs) of a forward and backward over n pairs."""
    import torch

    inputs = pairs(n, width)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    begin = time.perf_counter()
    loss(way, *inputs).backward()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    return time.perf_counter() - begin, (torch.cuda.max_memory_allocated() - before) / 2**20


def gradient_error(way: str, n: int, width: int) -> float:
    """Largest difference between the gradient of the images and that of the tiles in float64, over the largest gradient."""
    import torch

    image, text, log_scale = pairs(n, width)
    exact = image.detach().double().requires_grad_()
    gradient = torch.autograd.grad(loss(way, image, text, log_scale), image)[0]
    expected = torch.autograd.grad(loss("tiles", exact, text.double(), log_scale.double()), exact)[0]
    return float((gradient - expected).abs().max() / expected.abs().max())


def pairs(n: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images float32 [n, width] and texts fp16 likewise on the GPU, and the log of the scale."""
    from benchmarks.contestants import losses

    image, text, log_scale = losses.pairs(n, width, "cuda")
    return image, text.half(), log_scale


def loss(way: str, image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
    """The loss by the "kernels" or by the "tiles"."""
    from nev.losses.contrastive import contrastive_loss

    return contrastive_loss(image, text, log_scale, kernel="fused" if way == "kernels" else "tiles").loss


app = make_command(main, "make bench NAME=loss_gpu")

if __name__ == "__main__":
    app()

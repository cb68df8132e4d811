"""The contrastive loss side by side: nev's tiles, open_clip's ClipLoss, and a plain matrix product of the tile's shape.

make bench NAME=loss
python benchmarks/loss.py --repetitions 3
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import report
from nev.common.cli import make_command, report_errors

TIME_GOAL, MEMORY_GOAL, FLOPS_GOAL = 0.33, 0.05, 0.8
NOTES = (
    "Forward and backward, float32, one process on every core; each measurement in a process of its own. The texts have no "
    "gradient in either. mib: most memory above what the inputs take.",
    "flops: the three matrix products of nev's loss, 6 N^2 D, over its seconds. gemm: a product of one tile, again and again, in "
    "the same process before and after the loss, by torch's way (MKL) or oneDNN's, whichever is faster. gradient_difference: "
    "largest, over the largest gradient, at the least N.",
    "collectives, sent_mib: of a forward and backward on 4 gloo processes of N / 4 pairs, the greatest N, as torch.distributed "
    "dispatches them, and what a ring sends from each rank for them. open_clip: --local-loss --gather-with-grad, as NCCL would "
    "be asked; unlocked: the texts want a gradient.",
)
WORLD, NARROW = 4, 32


def main(
    width: Annotated[int, typer.Option(min=8, help="D, numbers of a vector.")] = 768,
    sizes: Annotated[list[int] | None, typer.Option("--size", min=256, help="N. May be repeated.")] = None,
    alone: Annotated[list[int] | None, typer.Option(min=256, help="N of nev alone, once. May be repeated.")] = None,
    narrow: Annotated[
        list[int] | None, typer.Option(min=256, help=f"N of nev alone at D = {NARROW}, once. May be repeated.")
    ] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds; every contestant runs once in each.")] = 5,
    results: Annotated[
        Path, typer.Option(help="Folder of loss.json.", show_default="benchmarks/results")
    ] = report.RESULTS,
) -> None:
    """Measure the contrastive loss beside open_clip's; writes benchmarks/results/loss.json."""
    from benchmarks.contestants import collectives, losses, open_clip
    from benchmarks.contestants.processes import in_own_process

    console = Console()
    with report_errors():
        beside: dict[str, list[float]] = {}

        def seconds(name: str, n: int) -> float:
            found = in_own_process(losses.cost, name, n, width, name == "nev")
            beside.setdefault(f"{name}_{n}_mib", []).append(found.mib)
            if name == "nev":
                beside.setdefault(f"gemm_{n}_flops", []).append(found.gemm_flops)
                beside.setdefault(f"{name}_{n}_flops", []).append(6 * n**2 * width / found.seconds)
            return found.seconds

        sizes = sizes or [4096, 8192, 16384]
        names = list(losses.LOSSES)
        if missing := open_clip.not_installed():
            console.print(f"[yellow]open_clip is left out: {', '.join(missing)} not installed ({open_clip.INSTALL})[/]")
            names.remove("open_clip")
        contestants: dict[str, Callable[[], float]] = {}
        ratios: dict[str, report.Ratio] = {}
        for n in sizes:
            contestants |= {f"{name}_{n}_s": partial(seconds, name, n) for name in names}
            goals = (TIME_GOAL, MEMORY_GOAL, FLOPS_GOAL) if n == 16384 else (None, None, None)
            if "open_clip" in names:
                ratios[f"time_vs_open_clip_{n}"] = report.Ratio(
                    f"nev_{n}_s", f"open_clip_{n}_s", goals[0], at_most=True
                )
                ratios[f"memory_vs_open_clip_{n}"] = report.Ratio(
                    f"nev_{n}_mib", f"open_clip_{n}_mib", goals[1], at_most=True
                )
            ratios[f"flops_vs_gemm_{n}"] = report.Ratio(f"nev_{n}_flops", f"gemm_{n}_flops", goals[2])
        ratios["flops_vs_gemm"] = ratios[f"flops_vs_gemm_{sizes[-1]}"]
        figures = report.measure_interleaved(contestants, repetitions, console) | beside
        if "open_clip" in names:
            figures["gradient_difference"] = [in_own_process(losses.difference, min(sizes), width)]
        for locked in (True, False):
            kind = "" if locked else "unlocked_"
            for name in names:
                sent = collectives.traffic(name, WORLD, max(sizes) // WORLD, width, locked)
                figures |= {f"{name}_{kind}collectives": [sent.collectives], f"{name}_{kind}sent_mib": [sent.mib]}
            if "open_clip" in names:
                ratios[f"{kind}sent_vs_open_clip"] = report.Ratio(
                    f"nev_{kind}sent_mib", f"open_clip_{kind}sent_mib", None, at_most=True
                )
        for n in alone or []:
            found = in_own_process(losses.cost, "nev", n, width)
            figures |= {f"nev_{n}_s": [found.seconds], f"nev_{n}_mib": [found.mib]}
        for n in narrow or []:
            found = in_own_process(losses.cost, "nev", n, NARROW)
            figures |= {f"nev_{n}_d{NARROW}_s": [found.seconds], f"nev_{n}_d{NARROW}_mib": [found.mib]}
        report.write("loss", report.this_command(), figures, ratios, NOTES, results, console)


app = make_command(main, "make bench NAME=loss")

if __name__ == "__main__":
    app()

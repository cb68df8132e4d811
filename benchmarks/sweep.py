"""A sweep against the same trainings started one by one by hand, as somebody without Tune would: trials an hour.

make bench NAME=sweep
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console

from benchmarks import report
from nev.cluster.session import connect
from nev.common.cli import make_command, report_errors
from nev.config.data import Columns, DataSet
from nev.config.model import Text
from nev.data.prepare.synthetic import write_synthetic
from nev.embed.captions import embed_captions

ROOT = Path(__file__).parent.parent
GOAL = 1.1
SIZES, SEEDS = (64, 128, 256), (0, 1)
NOTES = (
    "Six trainings of the quickstart's model (three batch sizes, two seeds, the same samples seen), each validated at its end. "
    "by_hand: `pipelines/train.py` for one after another, each with all cores. sweep: `pipelines/ablate.py` on the same "
    "settings, as many at a time as it takes by itself. Both begin with the captions' vectors written.",
)


def main(
    samples: Annotated[int, typer.Option(min=1000, help="Pictures that each trial sees.")] = 20_000,
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds.")] = 3,
    results: Annotated[Path, typer.Option(help="Folder of sweep.json.", show_default="benchmarks/results")] = (
        report.RESULTS
    ),
) -> None:
    """Measure a sweep; writes benchmarks/results/sweep.json."""
    console = Console()
    with report_errors(), tempfile.TemporaryDirectory(prefix="nev-bench-") as name:
        folder = Path(name)
        write_synthetic(folder / "pictures", train=4000, val=500, seed=0)
        connect()
        embed_captions(
            [DataSet(str(folder / "pictures" / split), Columns()) for split in ("train", "val")], Text(), console
        )
        import ray

        ray.shutdown()  # each contestant starts its own
        figures = report.measure_interleaved(
            {
                "sweep_trials_per_h": partial(trials_per_hour, sweep, folder, samples),
                "by_hand_trials_per_h": partial(trials_per_hour, by_hand, folder, samples),
            },
            repetitions,
            console,
        )
        report.write(
            "sweep",
            report.this_command(),
            figures,
            {"sweep_vs_serial": report.Ratio("sweep_trials_per_h", "by_hand_trials_per_h", GOAL)},
            NOTES,
            folder=results,
            console=console,
        )


def trials_per_hour(contestant: object, folder: Path, samples: int) -> float:
    """The rate of one contestant over all trainings, from its start to its end."""
    assert callable(contestant)
    with tempfile.TemporaryDirectory(dir=folder) as output:
        begin = time.perf_counter()
        contestant(folder / "pictures", Path(output), samples)
        return len(SIZES) * len(SEEDS) * 3600 / (time.perf_counter() - begin)


def settings(pictures: Path, output: Path) -> dict[str, object]:
    """What all trainings have beside the quickstart's config."""
    return {
        "output": str(output),
        "data.train": str(pictures / "train"),
        "data.val": str(pictures / "val"),
        "eval.zero_shot.classes": str(pictures / "classes.txt"),
        "train.eval_every": None,
        "data.block_rows": 64,
        "workers.count": 1,
    }


def sweep(pictures: Path, output: Path, samples: int) -> None:
    """One command."""
    file = output / "sweep.yaml"
    raw = {
        "name": "sizes",
        "base": str(ROOT / "configs/quickstart.yaml"),
        "overrides": settings(pictures, output),
        "axes": {"train.global_batch": list(SIZES)},
        "seeds": list(SEEDS),
        "samples": samples,
        "metrics": ["zero_shot/top1"],
    }
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    run("ablate.py", "--config", str(file))


def by_hand(pictures: Path, output: Path, samples: int) -> None:
    """A command for each training."""
    for size in SIZES:
        for seed in SEEDS:
            chosen = {"name": f"size-{size}-{seed}", "seed": seed, "train.global_batch": size, "train.steps": None}
            chosen |= {"train.samples": samples, **settings(pictures, output)}
            options = [
                part for key, value in chosen.items() for part in ("--set", f"{key}={yaml.safe_dump(value).split()[0]}")
            ]
            run("train.py", "--config", str(ROOT / "configs/quickstart.yaml"), *options)


def run(pipeline: str, *options: str) -> None:
    """One of nev's commands, in a process of its own."""
    command_line = [sys.executable, str(ROOT / "pipelines" / pipeline), *options]
    subprocess.run(command_line, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL)


app = make_command(main, "make bench NAME=sweep")

if __name__ == "__main__":
    app()

"""The whole of nev on one laptop, from nothing: draw pictures, embed their captions, train, score, show.

python pipelines/quickstart.py
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nev.common.cli import Overrides, make_command, report_errors
from nev.config.file import load


def main(
    config: Annotated[str, typer.Option(help="Experiment file (YAML).")] = "configs/quickstart.yaml",
    overrides: Overrides = None,
    train: Annotated[int, typer.Option(min=256, help="Pictures to train on.")] = 8000,
    val: Annotated[int, typer.Option(min=64, help="Unseen pictures to score on.")] = 1000,
) -> None:
    """Draw captioned pictures, train a vision encoder into a locked text space, and show what it learnt."""
    console = Console()
    begin = time.perf_counter()
    with report_errors(console, "The same command goes on from the latest checkpoint."):
        experiment = load(config, overrides or [])
        from nev.cluster.session import connect
        from nev.config.paths import with_absolute_paths
        from nev.data.prepare.shards import Layout
        from nev.data.prepare.synthetic import write_synthetic
        from nev.embed.captions import embed_captions
        from nev.train.experiment import run_experiment, show_summary

        experiment = with_absolute_paths(experiment)
        folder = Path(experiment.data.train).parent
        if not all(_drawn(folder / split) for split in ("train", "val")):
            console.print(f"drawing {train + val:,} captioned pictures into {folder}", soft_wrap=True)
            write_synthetic(
                folder,
                train=train,
                val=val,
                seed=experiment.seed,
                # what it may replace is left of a run that was stopped while it drew
                layout=Layout(row_group_rows=experiment.data.block_rows, overwrite=True),
            )
        connect()
        splits = [str(folder / split) for split in ("train", "val")]
        embed_captions(splits, experiment.data.columns, experiment.text, console)
        summary = run_experiment(experiment, console)
    show_summary(summary, console)
    console.print(f"done in {time.perf_counter() - begin:.0f} s")


def _drawn(split: Path) -> bool:
    from nev.data.index import UNFINISHED

    return any(split.glob("*.parquet")) and not (split / UNFINISHED).exists()


app = make_command(main, "python pipelines/quickstart.py --set train.steps=200")

if __name__ == "__main__":
    app()

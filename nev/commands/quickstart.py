"""The whole of nev on one laptop, from nothing: draw pictures, embed their captions, train, score, show.

nev quickstart
"""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.console import Console

from nev.common.cli import Overrides, report_errors

EXAMPLE = "--set train.steps=200"


def main(
    config: Annotated[
        str, typer.Option("--config", help="Experiment: a file (YAML), or the name of a shipped one.")
    ] = "quickstart",
    overrides: Overrides = None,
    train: Annotated[int, typer.Option(min=256, help="Pictures to train on.")] = 8000,
    val: Annotated[int, typer.Option(min=64, help="Unseen pictures to score on.")] = 1000,
) -> None:
    """Draw captioned pictures, train a vision encoder into a locked text space, and show what the encoder learnt."""
    console = Console()
    start = time.perf_counter()
    with report_errors("The same command continues from the latest checkpoint."):
        from nev.config.file import load
        from nev.config.paths import with_absolute_paths

        experiment = with_absolute_paths(load(config, overrides or []))
        from nev.demo.quickstart import train_quickstart
        from nev.train.experiment import show_summary

        summary = train_quickstart(experiment, console, train, val)
    show_summary(summary, console)
    console.print(f"done in {time.perf_counter() - start:.0f} s")

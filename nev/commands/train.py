"""Train a vision encoder into the space of a locked text encoder. The same command resumes a run that stopped.

nev train --config cifar10
nev train --config cifar10 --set optim.lr=5e-4 --set name=cifar10-slow
ray job submit --working-dir . -- python pipelines/train.py --config CONFIG --set data.train=s3://... \\
    --set output=s3://... --set tracking.uri=http://...
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from nev.common.cli import ConfigFile, Overrides, report_errors

EXAMPLE = "--config cifar10 --set train.epochs=1"


def main(
    config: ConfigFile,
    overrides: Overrides = None,
    stop_after: Annotated[
        int | None, typer.Option(min=1, help="Stop after this step, with a checkpoint. The schedule does not change.")
    ] = None,
    with_trunk: Annotated[
        bool,
        typer.Option("--with-trunk", help="Save a locked trunk's weights with every checkpoint (train.save_trunk)."),
    ] = False,
) -> None:
    """Train a vision encoder into the space of a text encoder. The same command continues a run that stopped."""
    console = Console()
    with report_errors("The same command continues from the latest checkpoint."):
        from nev.config.file import load
        from nev.train.experiment import run_experiment, show_summary

        changes = [*(overrides or []), *(["train.save_trunk=true"] if with_trunk else [])]
        show_summary(run_experiment(load(config, changes), console, stop_after), console)

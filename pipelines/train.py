"""Train a vision encoder into the space of a locked text encoder; the same command goes on where a run stopped.

python pipelines/train.py --config configs/cifar10.yaml
python pipelines/train.py --config configs/cifar10.yaml --set optim.lr=5e-4 --set name=cifar10-slow
ray job submit --working-dir . -- python pipelines/train.py --config CONFIG --set data.train=s3://... \\
    --set output=s3://... --set tracking.uri=http://...
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from nev.common.cli import ConfigFile, Overrides, make_command, report_errors
from nev.config.file import load


def main(
    config: ConfigFile,
    overrides: Overrides = None,
    stop_after: Annotated[
        int | None, typer.Option(min=1, help="Stop after this step, with a checkpoint; the schedule stays whole.")
    ] = None,
) -> None:
    """Train a vision encoder into the space of a text encoder, locked or not; the same command goes on where a run stopped."""
    console = Console()
    with report_errors(console, "The same command goes on from the latest checkpoint."):
        experiment = load(config, overrides or [])
        from nev.train.experiment import run_experiment, show_summary

        show_summary(run_experiment(experiment, console, stop_after), console)


app = make_command(main, "python pipelines/train.py --config configs/cifar10.yaml --set train.epochs=1")

if __name__ == "__main__":
    app()

"""Score a checkpoint: zero-shot and retrieval on its experiment's validation set, or on another by --set data.val=...

python pipelines/evaluate.py --checkpoint runs/cifar10/checkpoints/step-00001170
python pipelines/evaluate.py --checkpoint runs/cifar10/checkpoints/step-00001170 --set data.val=data/other/val
python pipelines/evaluate.py --checkpoint s3://BUCKET/runs/cifar10/checkpoints/step-00001170
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated

import typer
from rich.console import Console

from nev.cli import Overrides, command, explained


def main(
    checkpoint: Annotated[str, typer.Option(help="Checkpoint: runs/NAME/checkpoints/step-..., or s3://...")],
    overrides: Overrides = None,
    output: Annotated[
        str | None,
        typer.Option(
            help="Folder or s3:// prefix for metrics.json and the galleries (default: the run's folder/evaluation)"
        ),
    ] = None,
) -> None:
    """Score a checkpoint on its experiment's validation set, or on another one."""
    console = Console()
    with explained(console):
        from nev.experiment import evaluate_checkpoint, metrics_table

        metrics, files = evaluate_checkpoint(checkpoint, overrides or [], output)
    console.print(metrics_table(metrics, checkpoint))
    for file in files:
        console.print(f"{PurePosixPath(file).stem:<11} {file}", highlight=False, soft_wrap=True)


app = command(main, "python pipelines/evaluate.py --checkpoint runs/cifar10/checkpoints/step-00001170")

if __name__ == "__main__":
    app()

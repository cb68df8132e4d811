"""Score a checkpoint: zero-shot and retrieval on its experiment's validation set, or on another by --set data.val=...

python pipelines/evaluate.py --checkpoint runs/cifar10/checkpoints/step-00001170
python pipelines/evaluate.py --checkpoint runs/cifar10/checkpoints/step-00001170 --set data.val=data/other/val
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nev.cli import Overrides, command, explained


def main(
    checkpoint: Annotated[str, typer.Option(help="Checkpoint folder: runs/NAME/checkpoints/step-...")],
    overrides: Overrides = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for metrics.json and the galleries (default: the run's folder/evaluation)"),
    ] = None,
) -> None:
    """Score a checkpoint on its experiment's validation set, or on another one."""
    console = Console()
    with explained(console):
        from nev.experiment import evaluate_checkpoint, metrics_table

        folder = output or Path(checkpoint).parent.parent / "evaluation"
        metrics, pictures = evaluate_checkpoint(checkpoint.rstrip("/"), overrides or [], folder)
    console.print(metrics_table(metrics, checkpoint))
    for path in (folder / "metrics.json", *pictures):
        console.print(f"{path.stem:<11} {path}", highlight=False, soft_wrap=True)


app = command(main, "python pipelines/evaluate.py --checkpoint runs/cifar10/checkpoints/step-00001170")

if __name__ == "__main__":
    app()

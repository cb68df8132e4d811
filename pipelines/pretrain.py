"""Make an initialisation: train an experiment's trunk on its own pictures, to name classes or to fill in masked patches.

python pipelines/pretrain.py --config configs/cifar10.yaml --objective supervised
python pipelines/pretrain.py --config configs/cifar10.yaml --objective mim --set train.epochs=10

The weights are for `vision.weights` of any experiment with the same trunk.
"""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from rich.console import Console

from nev.common.cli import ConfigFile, Overrides, make_command, report_errors
from nev.config.file import load


def main(
    config: ConfigFile,
    objective: Annotated[Literal["supervised", "mim"], typer.Option(help="What the trunk learns.")],
    overrides: Overrides = None,
) -> None:
    """Train the trunk of an experiment without texts; --set overrides it."""
    console = Console()
    with report_errors(console):
        experiment = load(config, overrides or [])
        from nev.train.pretrain import pretrain

        done = pretrain(experiment, objective, console)
    for name, value in done.metrics.items():
        console.print(f"{name:<20} {value:.4f}", highlight=False)
    console.print(f"weights     {done.weights}", highlight=False, soft_wrap=True)


app = make_command(main, "python pipelines/pretrain.py --config configs/cifar10.yaml --objective mim")

if __name__ == "__main__":
    app()

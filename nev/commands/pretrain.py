"""Pretrain the trunk of an experiment on its own pictures: to classify them, or to fill in masked patches.

nev pretrain --config cifar10 --objective supervised
nev pretrain --config cifar10 --objective mim --set train.epochs=10

The weights are an initialisation: `vision.weights` of any experiment with the same trunk.
"""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from rich.console import Console

from nev.common.cli import ConfigFile, Overrides, report_errors

EXAMPLE = "--config cifar10 --objective mim"


def main(
    config: ConfigFile,
    objective: Annotated[Literal["supervised", "mim"], typer.Option(help="What the trunk learns.")],
    overrides: Overrides = None,
) -> None:
    """Train the trunk of an experiment without texts, as an initialisation for other runs."""
    console = Console()
    with report_errors():
        from nev.config.file import load
        from nev.train.pretrain import pretrain

        trunk = pretrain(load(config, overrides or []), objective, console)
    for name, value in trunk.metrics.items():
        console.print(f"{name:<20} {value:.4f}", highlight=False)
    console.print(f"weights     {trunk.weights}", highlight=False, soft_wrap=True)

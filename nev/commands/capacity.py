"""The memory that a step of an experiment takes on each worker, and the collectives of a step. Nothing is trained.

nev capacity --config nomic_embed_vision_v1_5 --width 768
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from nev.common.cli import ConfigFile, Overrides, report_errors

if TYPE_CHECKING:
    from nev.train.capacity import Collective

EXAMPLE = "--config nomic_embed_vision_v1_5 --width 768"


def main(
    config: ConfigFile,
    overrides: Overrides = None,
    width: Annotated[
        int | None,
        typer.Option(min=1, help="Width of a text vector. Default: by the text encoder's config.json."),
    ] = None,
) -> None:
    """Compute the memory of a worker at the peak of a step, by purpose, and the collectives of a step."""
    console = Console()
    with report_errors():
        from nev.config.file import load

        experiment = load(config, overrides or [])
        from nev.models.text import text_width
        from nev.train.capacity import MEANING, collectives, estimate_memory, memory_table

        width = width or text_width(experiment.text)
        gpu = experiment.workers.gpus > 0
        bf16 = experiment.train.precision == "bf16" or (experiment.train.precision == "auto" and gpu)
        memory = memory_table(estimate_memory(experiment, width, bf16, gpu))
        messages = collectives(experiment, width)
    console.print(
        f"{experiment.name}: a worker of {experiment.workers.least}, texts of {width} numbers", highlight=False
    )
    console.print(_memory_table(memory, MEANING))
    if messages:
        console.print(_collectives_table(messages))


def _memory_table(memory: list[tuple[str, int]], meaning: dict[str, str]) -> Table:
    table = Table(title="memory at the peak of a step", title_justify="left")
    table.add_column("")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("what for")
    for name, nbytes in memory:
        table.add_row(name, decimal(nbytes), meaning[name], style="bold" if name == "peak" else None)
    return table


def _collectives_table(messages: list[Collective]) -> Table:
    table = Table(title="collectives a step", title_justify="left")
    for column in ("kind", "what", "count", "bytes"):
        table.add_column(column, justify="right" if column in ("count", "bytes") else "left")
    for message in messages:
        table.add_row(message.kind, message.purpose, str(message.count), decimal(message.nbytes))
    return table

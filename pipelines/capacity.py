"""How much memory a step of an experiment takes on each worker, and what the workers say to each other; nothing is trained.

python pipelines/capacity.py --config configs/nomic_embed_vision_v1_5.yaml --width 768
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from nev.common.cli import ConfigFile, Overrides, make_command, report_errors
from nev.config.file import load

EXAMPLE = "python pipelines/capacity.py --config configs/nomic_embed_vision_v1_5.yaml --width 768"


def main(
    config: ConfigFile,
    overrides: Overrides = None,
    width: Annotated[
        int | None,
        typer.Option(min=1, help="Numbers of a text vector (default: the text encoder's, by its config.json)."),
    ] = None,
) -> None:
    """Print the bytes of a worker at the peak of a step, by what they are for, and the collectives of a step."""
    console = Console()
    with report_errors(console):
        experiment = load(config, overrides or [])
        from nev.models.text import text_width
        from nev.train.capacity import MEANING, collectives, estimate_memory, memory_table

        width = width or text_width(experiment.text)
        gpu = experiment.workers.gpus > 0
        bf16 = experiment.train.precision == "bf16" or (experiment.train.precision == "auto" and gpu)
        found = estimate_memory(experiment, width, bf16, gpu)
        said = collectives(experiment, width)
    console.print(
        f"{experiment.name}: a worker of {experiment.workers.least}, texts of {width} numbers", highlight=False
    )
    shown = Table(title="memory at the peak of a step", title_justify="left")
    shown.add_column("")
    shown.add_column("bytes", justify="right", no_wrap=True)
    shown.add_column("what for")
    for name, nbytes in memory_table(found):
        shown.add_row(name, decimal(nbytes), MEANING[name], style="bold" if name == "peak" else None)
    console.print(shown)
    if said:
        spoken = Table(title="collectives a step", title_justify="left")
        for column in ("kind", "what", "count", "bytes"):
            spoken.add_column(column, justify="right" if column in ("count", "bytes") else "left")
        for one in said:
            spoken.add_row(one.kind, one.what, str(one.count), decimal(one.nbytes))
        console.print(spoken)


app = make_command(main, EXAMPLE)

if __name__ == "__main__":
    app()

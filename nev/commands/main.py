"""`nev`: every command on one help page, in the order of use.

The module of a command holds `main`, whose parameters are the options, and `EXAMPLE`, the arguments of an example. Heavy
imports are inside `main`, so that a help page needs no torch, Ray, transformers or MLflow.
"""

from __future__ import annotations

from types import ModuleType
from typing import Annotated

import typer

from nev import __version__
from nev.commands import (
    ablate,
    capacity,
    demo,
    embed_images,
    embed_text,
    evaluate,
    export,
    filter,
    index,
    plan,
    prepare,
    pretrain,
    quickstart,
    serve,
    train,
)
from nev.common.cli import HELP, make_command

TRAINING = "From pictures to a scored encoder, in this order"
SEARCH = "From an encoder to a search, in this order"
AROUND = "Around a training"
LAPTOP = "All of the above on one laptop, from nothing"

# The module of each command, and its group on the help page.
COMMANDS: dict[str, tuple[ModuleType, str]] = {
    "prepare": (prepare, TRAINING),
    "embed-text": (embed_text, TRAINING),
    "embed-images": (embed_images, TRAINING),
    "train": (train, TRAINING),
    "evaluate": (evaluate, TRAINING),
    "export": (export, SEARCH),
    "index": (index, SEARCH),
    "serve": (serve, SEARCH),
    "filter": (filter, AROUND),
    "ablate": (ablate, AROUND),
    "capacity": (capacity, AROUND),
    "plan": (plan, AROUND),
    "pretrain": (pretrain, AROUND),
    "quickstart": (quickstart, LAPTOP),
    "demo": (demo, LAPTOP),
}


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nev {__version__}")
        raise typer.Exit


def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print nev's version.")
    ] = False,
) -> None:
    """Train a vision encoder into the space of a locked text embedder, on Ray."""


def make_app() -> typer.Typer:
    """Make the application `nev`, with a subcommand for each of COMMANDS."""
    app = typer.Typer(no_args_is_help=True, context_settings=HELP, pretty_exceptions_enable=False)
    app.callback()(main)
    for name, (module, group) in COMMANDS.items():
        epilog = f"Example: nev {name} {module.EXAMPLE}"
        app.command(name, epilog=epilog, rich_help_panel=group, context_settings=HELP)(module.main)
    return app


def make_pipeline(name: str) -> typer.Typer:
    """Make an application of one of COMMANDS, for the file in `pipelines/` that a submitted job runs."""
    module, _ = COMMANDS[name]
    return make_command(module.main, f"python pipelines/{name.replace('-', '_')}.py {module.EXAMPLE}")


app = make_app()

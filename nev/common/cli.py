"""What every command shares: errors that explain themselves, and the `--config` and `--set` options."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from nev.common.errors import NevError
from nev.common.quiet import quiet

ConfigFile = Annotated[str, typer.Option("--config", help="Experiment file (YAML); the shipped ones are in configs/.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override one setting: section.key=value. May be repeated.")
]


@contextmanager
def report_errors(console: Console, interrupted: str = "Nothing is lost but this command's work.") -> Iterator[None]:
    """Keep libraries quiet; print a NevError as one message and exit with 2; let a bug keep its traceback.

    interrupted: what a user who pressed Ctrl-C wants to know; the exit status is 130 then, as the shell has it.
    """
    quiet()
    try:
        yield
    except NevError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        console.print(f"[bold]interrupted.[/] {escape(interrupted)}", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None


def make_command(main: object, example: str) -> typer.Typer:
    """A Typer application of one command, with an example under its help."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(epilog=f"Example: {example}")(main)  # type: ignore[type-var]
    return app

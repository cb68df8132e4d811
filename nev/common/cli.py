"""What all commands share: the report of errors, and the options `--config`, `--set` and `--gpus`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from nev.common.errors import NevError
from nev.common.quiet import quiet
from nev.common.signals import Stopped

ConfigFile = Annotated[
    str, typer.Option("--config", help="Experiment: a file (YAML), or the name of a shipped one (quickstart, ...).")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override one setting: section.key=value. May be repeated.")
]
Gpus = Annotated[
    int | None,
    typer.Option(
        "--gpus", min=1, help="GPUs to request from the cluster, which may start nodes. Default: the GPUs that are up."
    ),
]

TextEncoder = Annotated[
    str | None,
    typer.Option(
        "--text-encoder",
        help="Another place of the same text encoder: a folder, a hub name, or a pip package.",
        rich_help_panel="The model",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit of a model on the hub.", rich_help_panel="The model"),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code from the text encoder's repository. Read that code first.",
        rich_help_panel="The model",
    ),
]

HELP = {"help_option_names": ["-h", "--help"]}


@contextmanager
def report_errors(interrupted: str = "Nothing is lost but this command's work.") -> Iterator[None]:
    """Keep libraries quiet, and turn errors into a message on stderr and an exit status.

    A NevError prints its message alone; the exit status is 2. Any other error is a bug and keeps its traceback.

    interrupted: what Ctrl-C and SIGTERM print; the exit status is 130 or 143, as in a shell.
    """
    quiet()
    try:
        yield
    except NevError as error:
        _print_message(f"[bold red]error:[/] {escape(str(error))}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        _print_message(f"[bold]interrupted.[/] {escape(interrupted)}")
        raise typer.Exit(130) from None
    except Stopped as stop:
        _print_message(f"[bold]stopped by SIGTERM[/] (exit status {stop.code}). {escape(interrupted)}")
        raise


def given_options(context: typer.Context) -> set[str]:
    """The options that were given on the command line."""
    origins = {option.opts[0]: context.get_parameter_source(str(option.name)) for option in context.command.params}
    return {option for option, origin in origins.items() if origin and origin.name == "COMMANDLINE"}


def _print_message(markup: str) -> None:
    Console(stderr=True).print(markup, highlight=False, soft_wrap=True)


def make_command(main: Callable[..., Any], example: str) -> typer.Typer:
    """A Typer application of one command, with an example under its help."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(epilog=f"Example: {example}", context_settings=HELP)(main)
    return app

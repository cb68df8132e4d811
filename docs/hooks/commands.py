"""The tables of the page `commands.md`, made from the commands themselves: options, defaults, an example."""

from __future__ import annotations

from typing import Any

from typer.core import TyperArgument, TyperGroup
from typer.main import get_command

MARK = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs' event: replace the mark of a page by a section for each command."""
    return markdown.replace(MARK, write_commands()) if MARK in markdown else markdown


def write_commands() -> str:
    """Markdown: what each command of `nev` does, its options, and an example."""
    from nev.commands.main import app

    group = get_command(app)
    assert isinstance(group, TyperGroup)
    return "\n\n".join(write_command(name, command) for name, command in group.commands.items())


def write_command(name: str, command: Any) -> str:
    """Markdown of one command."""
    lines = ["| option | default | |", "|---|---|---|"]
    for option in command.params:
        if isinstance(option, TyperArgument) or option.hidden:
            continue
        default = "**required**" if option.required else "" if option.default is None else f"`{option.default}`"
        names = ", ".join(f"`{name}`" for name in option.opts)
        cells = (names, default, " ".join((option.help or "").split()))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    example = str(command.epilog).removeprefix("Example: ")
    return "\n".join([f"## `nev {name}`", "", command.help or "", "", f"```sh\n{example}\n```", "", *lines])

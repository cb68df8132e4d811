"""What every reader of a foreign format shares: its settings, and how its input is found."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from pydantic import field_validator

from nev.config import Columns, ConfigError, Limits, Section


class SourceOptions(Section):
    """How to read a source. `templates` make the captions of a labelled set: '{}' stands for the class name.

    score: the column with the similarity of picture and caption. metadata: DataComp's parquet files or their folder.
    """

    columns: Columns = Columns()
    label_name: str | None = None
    templates: tuple[str, ...] = ()
    score: str | None = None
    metadata: tuple[str, ...] = ()
    limits: Limits = Limits()

    @field_validator("templates")
    @classmethod
    def _has_slot(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if template.count("{}") != 1:
                raise ValueError(f"a template needs exactly one '{{}}' for the class name: {template!r}")
        return templates


def fill(templates: tuple[str, ...], name: str) -> list[str]:
    """The captions of a class: each template about its name, whose underscores are read as spaces."""
    return [template.replace("{}", name.replace("_", " ")) for template in templates]


def find_files(inputs: Iterable[str | Path], suffixes: tuple[str, ...]) -> list[Path]:
    """The files that `inputs` name, sorted: each is a file, a folder (searched whole) or a glob pattern.

    In a folder, files whose name or parent begins with '_' or '.' are left out. Raises ConfigError where an input gives
    nothing, naming what was found instead.
    """
    files: set[Path] = set()
    for given in map(str, inputs):
        path = Path(given)
        if path.is_file():
            found = [path]
        elif path.is_dir():
            inside = [
                file
                for file in path.rglob("*")
                if file.is_file() and not any(part.startswith(("_", ".")) for part in file.relative_to(path).parts)
            ]
            found = [file for file in inside if file.name.endswith(suffixes)]
            if not found:
                others = ", ".join(sorted({file.suffix or file.name for file in inside})) or "nothing"
                raise ConfigError(f"{given}: no {' or '.join(suffixes)} file in this folder (it holds: {others})")
        else:
            found = [file for file in Path(path.anchor).glob(str(path.relative_to(path.anchor))) if file.is_file()]
            if not found:
                raise ConfigError(f"{given}: no such file or folder, and as a pattern it matches nothing")
        files.update(found)
    if not files:
        raise ConfigError("a source needs at least one input: a file, a folder or a pattern")
    return sorted(files)


def shared_folder(folders: Iterable[Path]) -> Path:
    """The deepest folder that holds all of `folders`, absolute, since relative and absolute ones may be mixed."""
    # Not Path.resolve: a file's name is where it was found, whatever the links on the way.
    return Path(os.path.commonpath([os.path.abspath(folder) for folder in folders]))  # noqa: PTH100


def name_in(folder: Path, path: Path) -> str:
    """The path of `path` from `folder`, with '/' on every system."""
    return Path(os.path.relpath(path, folder)).as_posix()

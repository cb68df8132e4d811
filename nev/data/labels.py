"""The class names of a labelled set: `classes.txt`, one name a line, in the order of the integer labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from nev.config.base import ConfigError
from nev.data.rows import Row
from nev.storage.reading import read_bytes

Names = dict[int, tuple[str, str]]  # label to the name, and the uid of the first row with that label


class ClassNames(NamedTuple):
    """The content of a classes.txt.

    location: path or URL of the file.
    names: class names, in the order of the labels.
    """

    location: str
    names: list[str]


def read_class_names(location: str) -> ClassNames | None:
    """Read the classes.txt at `location` (path or URL). None where there is no file."""
    content = read_bytes(location)
    return None if content is None else ClassNames(location, parse_class_names(content, location))


def parse_class_names(content: bytes, where: str) -> list[str]:
    """The names in the content of a classes.txt. where: the file, for messages.

    Raises ConfigError for content that is not UTF-8, and for a blank line.
    """
    try:
        names = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not text in UTF-8 ({error}); it needs one class name a line") from error
    while names and not names[-1].strip():
        names.pop()
    if not all(name.strip() for name in names):
        line = next(number for number, name in enumerate(names, 1) if not name.strip())
        raise ConfigError(f"{where}: line {line} is blank. A class is known by its line: give it a name there.")
    return names


def collect_names(rows: Iterable[Row], names: Names, expected: ClassNames | None) -> Iterator[Row]:
    """Yield the rows, and collect the names of their labels in `names`. Blank names are ignored.

    Raises ConfigError as `add_name` does.
    """
    for row in rows:
        label, name = row.get("label"), row.get("label_name")
        if label is not None and name and name.strip():
            add_name(names, label, name, row["uid"], expected)
        yield row


def add_name(names: Names, label: int, name: str, uid: str, expected: ClassNames | None) -> None:
    """Record the name of a label, from the row `uid`.

    Raises ConfigError for a name with line breaks, for a second name of one label, and for a name that differs from `expected`.
    """
    if name.splitlines() != [name]:
        raise ConfigError(
            f"row {uid}: label {label} is {name!r}, but a name is one line in classes.txt: correct the name"
        )
    if (earlier := names.setdefault(label, (name, uid))[0]) != name:
        raise ConfigError(f"row {uid}: label {label} is {name!r} here and {earlier!r} in an earlier row")
    if expected is None:
        return
    known = expected.names[label] if 0 <= label < len(expected.names) else None
    if known != name:
        raise ConfigError(
            f"{expected.location}: label {label} is {known!r} there and {name!r} in row {uid}. "
            "The splits of one folder share their classes: use another folder, or remove that file."
        )


def is_complete(names: Names, highest: int) -> bool:
    """Whether every label from 0 to the highest has a name."""
    return sorted(names) == list(range(highest + 1))

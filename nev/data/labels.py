"""The class names of a labelled set: `classes.txt`, one name a line, in the order of the integer labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from nev.config.base import ConfigError
from nev.data.rows import Row
from nev.storage.reading import read_bytes

Names = dict[int, tuple[str, str]]  # label to its name, and the uid of the row that gave it first


class ClassNames(NamedTuple):
    """What a classes.txt says: where it lies, and its names."""

    location: str
    names: list[str]


def read_class_names(location: str) -> ClassNames | None:
    """What the classes.txt at `location` (path or URL) says, or None where there is none."""
    content = read_bytes(location)
    return None if content is None else ClassNames(location, parse_class_names(content, location))


def parse_class_names(content: bytes, where: str) -> list[str]:
    """The names in a classes.txt, which `where` names. Raises ConfigError for other bytes than UTF-8 and for a blank line."""
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


def watch(rows: Iterable[Row], names: Names, against: ClassNames | None) -> Iterator[Row]:
    """Pass the rows on and gather the names of their labels in `names`; a blank one is none. Raises ConfigError as `add` does."""
    for row in rows:
        label, name = row.get("label"), row.get("label_name")
        if label is not None and name and name.strip():
            add(names, label, name, row["uid"], against)
        yield row


def add(names: Names, label: int, name: str, uid: str, against: ClassNames | None) -> None:
    """Note that the row `uid` calls `label` `name`.

    Raises ConfigError if a name has line breaks, if one label has two names, or another name than `against` gives it.
    """
    if name.splitlines() != [name]:
        raise ConfigError(f"row {uid}: label {label} is {name!r}, but a name is one line in classes.txt: mend it")
    if (before := names.setdefault(label, (name, uid))[0]) != name:
        raise ConfigError(f"row {uid}: label {label} is {name!r} here and {before!r} in an earlier row")
    if against is None:
        return
    there = against.names[label] if 0 <= label < len(against.names) else None
    if there != name:
        raise ConfigError(
            f"{against.location}: label {label} is {there!r} there and {name!r} in row {uid}. "
            "The splits of one folder share their classes: use another folder, or remove that file."
        )


def complete(names: Names, highest: int) -> bool:
    """Whether `names` names every label from 0 to the highest."""
    return sorted(names) == list(range(highest + 1))

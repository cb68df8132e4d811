"""The class names of a labelled set: `classes.txt`, one name a line, in the order of the integer labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from nev.config import ConfigError
from nev.data.rows import Row


def watch(rows: Iterable[Row], names: dict[int, str], against: Path) -> Iterator[Row]:
    """Pass the rows on and gather label -> name in `names`.

    Raises ConfigError if one label has two names, or another name than `against` (a classes.txt) gives it if it exists.
    """
    known = dict(enumerate(against.read_text(encoding="utf-8").splitlines())) if against.exists() else None
    for row in rows:
        label, name = row.get("label"), row.get("label_name")
        if label is not None and name is not None:
            if (before := names.setdefault(label, name)) != name:
                raise ConfigError(f"row {row['uid']}: label {label} is {name!r} here and {before!r} in an earlier row")
            if known is not None and known.get(label) != name:
                raise ConfigError(
                    f"{against}: label {label} is {known.get(label)!r} there and {name!r} in row {row['uid']}. "
                    "The splits of one folder share their classes: use another folder, or remove that file."
                )
        yield row


def write(names: dict[int, str], path: Path) -> bool:
    """Write classes.txt, unless it is there or `names` does not name every label from 0 up. True if it is there now."""
    if path.exists():
        return True
    if not names or sorted(names) != list(range(len(names))):
        return False
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text("".join(f"{names[label]}\n" for label in range(len(names))), encoding="utf-8")
    partial.replace(path)
    return True

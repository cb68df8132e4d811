"""A number with its origin, so that a table can say of each number how far to trust it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from typing import Literal, NamedTuple

from nev.config.base import Section
from nev.config.file import load_yaml

Origin = Literal["measured", "published", "assumed", "computed"]
TRUST: tuple[Origin, ...] = ("measured", "published", "computed", "assumed")  # from the most to the least


class Number(NamedTuple):
    """A value, its origin, and what it is from."""

    value: float
    origin: Origin
    source: str = ""


class _Entry(Section):
    value: float
    origin: Origin
    source: str


Numbers = Mapping[str, Number]


@cache
def shipped_numbers() -> Numbers:
    """The numbers of `numbers.yaml`, by name."""
    raw = load_yaml(files("nev.planner").joinpath("numbers.yaml").read_text(encoding="utf-8"))
    entries = {name: _Entry.model_validate(entry) for name, entry in raw.items()}
    return {name: Number(entry.value, entry.origin, entry.source) for name, entry in entries.items()}


def least_trusted(origins: Iterable[Origin]) -> Origin:
    """The origin that weakens a result most."""
    return max(origins, key=TRUST.index)

"""Words of messages."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 picture", "2,000 pictures"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"

"""The base of every error that nev raises on purpose: its message says what, where and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

NAMED = 4  # names in one message


class NevError(Exception):
    """Something that the user can mend. Commands print its message alone, without a traceback."""


class NotReady(NevError, ValueError):
    """More than one thing is in the way of a run. The message lists them."""


class ErrorCollector:
    """Checks one after another, each the body of a `with`: an error of one does not hide those of the next."""

    def __init__(self) -> None:
        self._found: list[NevError] = []

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, NevError):
            return False
        if str(error) not in map(str, self._found):
            self._found.append(error)
        return True

    def __len__(self) -> int:
        return len(self._found)

    def refuse(self) -> None:
        """Raise what was found: the error itself where it is one alone, NotReady where there are more."""
        if len(self._found) == 1:
            raise self._found[0]
        if self._found:
            listed = "\n".join(f"  {number}. {error}" for number, error in enumerate(self._found, 1))
            raise NotReady(f"{len(self._found)} things are in the way:\n{listed}")


def first_few(names: Sequence[str]) -> str:
    """The first four of some names, and how many more there are, for a message."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")

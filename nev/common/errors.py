"""The base of all errors that nev raises on purpose. Their messages say what is wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

MAX_NAMES = 4  # in one message


class NevError(Exception):
    """An error that the user can fix. Commands print the message alone, without a traceback."""


class NotReady(NevError, ValueError):
    """Several errors that keep a run from starting. The message lists them."""


class ErrorCollector:
    """Collects the errors of several checks, so that the user sees all of them at once. Each check is the body of a `with`."""

    def __init__(self) -> None:
        self._errors: list[NevError] = []

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, NevError):
            return False
        if str(error) not in map(str, self._errors):
            self._errors.append(error)
        return True

    def __len__(self) -> int:
        return len(self._errors)

    def refuse(self) -> None:
        """Raise the collected errors: a single error as it is, several errors as one NotReady. Return where there is none."""
        if len(self._errors) == 1:
            raise self._errors[0]
        if self._errors:
            listed = "\n".join(f"  {number}. {error}" for number, error in enumerate(self._errors, 1))
            raise NotReady(f"{len(self._errors)} things are in the way:\n{listed}")


def first_few(names: Sequence[str]) -> str:
    """Up to four names, and the number of further names, for a message."""
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def first_line(error: BaseException) -> str:
    """The first line of an error that says something, for a message; the error's name where none does."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

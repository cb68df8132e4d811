"""The base of every error that nev raises on purpose: its message says what, where and what to do."""


class NevError(Exception):
    """Something that the user can mend. Commands print its message alone, without a traceback."""

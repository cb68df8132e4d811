"""The version of nev."""

__version__ = "0.1.0"

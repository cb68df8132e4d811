"""What is wrong with a configuration, in plain words."""

from __future__ import annotations

import difflib
from typing import Any, get_args

from pydantic import BaseModel


def in_plain_words(schema: type[BaseModel], problem: Any) -> str:
    """A problem that pydantic found, in plain words: for an unknown key the known ones that are like it."""
    if problem["type"] != "extra_forbidden":
        return str(problem["msg"]).removeprefix("Value error, ")
    *sections, key = map(str, problem["loc"])
    for name in sections:
        kind = schema.model_fields[name].annotation if name in schema.model_fields else None
        kinds = [one for one in (kind, *get_args(kind)) if isinstance(one, type) and issubclass(one, BaseModel)]
        if not kinds:
            return "unknown key"
        schema = kinds[0]
    close = difflib.get_close_matches(key, schema.model_fields, n=3) or list(schema.model_fields)
    return f"unknown key; there is {', '.join(close)}"

"""The tables of the page `config.md`, made from the schemas: field, type with bounds, default, description.

A line `<!-- schema: nev.config.experiment.Experiment -->` in a page is replaced by a table for each section of that schema.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator
from importlib import import_module
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

MARK = re.compile(r"^<!-- schema: ([\w.]+) -->$", re.MULTILINE)
NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", Any: "anything"}
Schema = type[BaseModel]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs' event: replace each mark of the page by the tables of its schema."""
    return MARK.sub(lambda mark: write_schema(load_schema(mark[1])), markdown)


def load_schema(name: str) -> Schema:
    """The schema of a dotted name, `package.module.Class`."""
    module, _, attribute = name.rpartition(".")
    schema: Schema = getattr(import_module(module), attribute)
    return schema


def write_schema(root: Schema) -> str:
    """Markdown: a heading and a table for each section, those of fields in the order of the fields."""
    parts = []
    for place, section in sections(root):
        title = f"`{place}`" if place else f"The file: `{root.__name__}`"
        doc = " ".join((section.__doc__ or "").split())
        lines = ["| field | type | default | |", "|---|---|---|---|"]
        lines += [write_field(root, place, field.alias or name, field) for name, field in section.model_fields.items()]
        parts.append("\n".join([f"### {title} {{ #{anchor(root, place)} }}", "", doc, "", *lines]))
    return "\n\n".join(parts)


def sections(schema: Schema, place: str = "") -> Iterator[tuple[str, Schema]]:
    """(dotted place, section) of the schema and of every section below; `[]` stands for an entry of a list or map."""
    yield place, schema
    for name, field in schema.model_fields.items():
        for below, entry in _sections_in(field.annotation):
            yield from sections(below, f"{place}.{name}{entry}".lstrip("."))


def _sections_in(annotation: Any, entry: str = "") -> Iterator[tuple[Schema, str]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, entry
        return
    for argument in get_args(annotation):
        listed = get_origin(annotation) in (tuple, list, dict)
        yield from _sections_in(argument, "[]" if listed else entry)


def write_field(root: Schema, place: str, name: str, field: FieldInfo) -> str:
    """One row of a table. The anchor of a field is `SCHEMA.DOTTED.NAME`."""
    dotted = f"{place}.{name}".lstrip(".")
    cells = (
        f'<span id="{root.__name__.lower()}.{dotted}">`{dotted}`</span>',
        write_type(field.annotation, field.metadata),
        write_default(field),
        " ".join((field.description or "").split()),
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write_type(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    """A type in words, with its bounds: `integer > 0, or null`."""
    bounds = "".join(_bounds(metadata))
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return write_type(arguments[0], [*annotation.__metadata__, *metadata])
    if origin in (Union, types.UnionType):
        given = [write_type(argument, metadata) for argument in arguments if argument is not type(None)]
        return " or ".join(given) + (", or null" if type(None) in arguments else "")
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is tuple and arguments[-1] is not Ellipsis:
        return "[" + ", ".join(write_type(argument) for argument in arguments) + "]" + bounds
    if origin in (tuple, list):
        return f"list of {write_type(arguments[0])}{bounds}"
    if origin is dict:
        return f"map from {write_type(arguments[0])} to {write_type(arguments[1])}{bounds}"
    if annotation not in NAMES:
        return "section"
    return NAMES[annotation] + bounds


def _is_technical(bound: float) -> bool:
    """Whether a bound keeps out what no run can use, and would only make the reader stop."""
    return abs(bound) >= (2**53 if isinstance(bound, int) else 1e3)


def _bounds(metadata: list[Any] | tuple[Any, ...]) -> Iterator[str]:
    limits = [limit for one in metadata for limit in (one.metadata if isinstance(one, FieldInfo) else [one])]
    for limit in limits:
        for key, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
            if (value := getattr(limit, key, None)) is not None and not _is_technical(value):
                yield f" {sign} {value:,}" if isinstance(value, int) else f" {sign} {value:g}"
        if (least := getattr(limit, "min_length", None)) is not None:
            yield f", {least} or more"
        if (pattern := getattr(limit, "pattern", None)) is not None:
            yield f" like `{pattern}`"


def write_default(field: FieldInfo) -> str:
    """The default as a config file has it; of a section its own defaults stand below."""
    if field.default is PydanticUndefined:
        return "**required**"
    if isinstance(field.default, BaseModel):
        return ""
    if isinstance(field.default, float):
        return f"`{field.default:.6g}`"
    return f"`{json.dumps(field.default, ensure_ascii=False)}`"


def anchor(root: Schema, place: str) -> str:
    """The anchor of a section's heading."""
    return "-".join([root.__name__.lower(), *(re.findall(r"\w+", place) or ["file"])])

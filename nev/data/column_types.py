"""Which Arrow types a column may have for its role. The same set is read alike by training, `prepare` and evaluation.

Arrow has several types for one content: views (arrow-rs, polars), large types, dictionaries (pandas' categories), lists of a
fixed size, and null where a column of a shard is empty. Their values are the same Python values.
"""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa

from nev.data.tars import is_place
from nev.storage.reading import DataError

NEEDED = {
    "uid": "a string, a whole number or a UUID",
    "image": "encoded bytes, or a struct with `bytes`",
    "caption": "a string or a list of strings",
    "label": "a whole number",
    "label_name": "a string",
    "score": "a number",
    "status": "a string",
}


def fits(role: str, kind: pa.DataType) -> bool:
    """Whether a column of a type can have a role of NEEDED. A column without a value (null) fits each role but the picture's."""
    kind = _inner(kind)
    if role == "image":
        if is_place(kind):
            return True
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = _inner(kind.field("bytes").type)
        return _is_binary(kind)
    if pa.types.is_null(kind):
        return True
    if role == "caption" and _is_list(kind):
        return _is_text(_inner(kind.value_type)) or pa.types.is_null(kind.value_type)
    if role == "label":
        return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))
    if role == "score":
        return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))
    if role == "uid" and (pa.types.is_integer(kind) or kind == pa.uuid()):
        return True
    return _is_text(kind)


def as_labels(values: list[Any], where: str | None = None) -> list[int | None]:
    """The values of a column of labels. A label that is missing makes pandas write floats, with NaN for that one.

    where: the file. Raises DataError for a number that is not whole. None: such numbers are no labels, but None.
    """
    labels: list[int | None] = []
    for value in values:
        is_missing = value is None or math.isnan(value)
        is_whole = not is_missing and math.isfinite(value) and value == int(value)
        if where and not is_missing and not is_whole:
            raise DataError(
                f"{where}: the label {value} is no whole number. Name the column of labels: data.columns.label, --label"
            )
        labels.append(int(value) if is_whole else None)
    return labels


def _inner(kind: pa.DataType) -> pa.DataType:
    """The type of a dictionary's values; other types as they are."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_list(kind: pa.DataType) -> bool:
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view)
    return any(test(kind) for test in (*tests, pa.types.is_large_list_view))

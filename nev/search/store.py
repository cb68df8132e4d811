"""What every store of vectors does, and what is recorded in a store.

A row of a store is an item: `uid` (first), `kind`, `vector`, and, where known, `text`, `source` and `thumbnail`. A row whose kind
is not "image" is a text: rows of tables that other programs made have no kind.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, Protocol

import pyarrow as pa
from pydantic import Field

from nev.common.errors import NevError, first_few
from nev.config.base import Positive, Section
from nev.config.model_spec import Calibration
from nev.data.vectors import as_array, as_column
from nev.ops.vectors import Floats, scale_to_unit

FORMAT = 1
KEY = "nev.index"  # of the metadata
ANN_ROWS = 20_000  # a store with fewer vectors is searched whole
Kind = Literal["image", "text"]
IMAGE: Final = "image"
TEXT: Final = "text"
Ann = Literal["auto", "none", "hnsw", "ivf"]
Value = str | int | float | bool | None
Where = Mapping[str, Value]  # column: the value that a row has there; None stands for NULL


class SearchError(NevError, ValueError):
    """An index that cannot be opened, filled or searched as asked. The message says what, where, and what to do."""


class StoreFailed(SearchError):
    """A store that cannot be reached, or has failed: the same call may succeed later."""


class Columns(Section):
    """Names of a table's columns."""

    uid: str = Field(default="uid", min_length=1)
    """Identifier of a row."""
    vector: str = Field(default="vector", min_length=1)
    """Vector."""
    text: str = Field(default="text", min_length=1)
    """A text, or a picture's caption."""
    kind: str = Field(default="kind", min_length=1)
    """`image` for a picture. Any other value, and NULL, stands for a text."""
    source: str = Field(default="source", min_length=1)
    """Path of a picture's file, or TAR/MEMBER."""
    thumbnail: str = Field(default="thumbnail", min_length=1)
    """A picture's thumbnail: JPEG."""
    image_uid: str = Field(default="image_uid", min_length=1)
    """Identifier of a picture, in a table whose column `uid` holds no strings."""


class StoreSpec(Section):
    """What is recorded in a store."""

    format: int = FORMAT
    """Version of this schema."""
    width: Positive
    """Numbers of a vector."""
    text_fingerprint: str | None = None
    """Fingerprint of the text tower that made the text vectors (`nev.Model.text_fingerprint`). null: not verified."""
    text_prompt: Literal["query", "document"] = "document"
    """Prompt that the text vectors were made with."""
    model: str | None = None
    """Name of the pictures' model. null: no pictures yet."""
    fingerprint: str | None = None
    """Fingerprint of the pictures' vision tower (`nev.Model.fingerprint`)."""
    calibration: Calibration | None = None
    """Means for lists of pictures and texts. null: the model was not validated."""
    columns: Columns = Columns()
    """Names of the table's columns."""


class Upserted(NamedTuple):
    """Rows that were new, and rows that were there."""

    inserted: int
    updated: int


class VectorStore(Protocol):
    """A table of items in some database."""

    @property
    def name(self) -> str:
        """The place and the table, for messages. Without a password."""

    @property
    def columns(self) -> Columns:
        """Names of the table's columns."""

    @property
    def width(self) -> int | None:
        """Numbers of a vector. None: there is no table yet."""

    @property
    def filters(self) -> Mapping[str, tuple[type, ...]]:
        """Columns that `where` may name, and the types of their values."""

    @property
    def is_remade(self) -> bool:
        """Whether the table is another than the one that the record was written for: its vectors may be others."""

    @property
    def takes_texts(self) -> bool:
        """Whether nev can write texts: uids are strings. Pictures have a column for theirs where they are not."""

    def read_spec(self) -> StoreSpec | None:
        """What nev has recorded. None: the table is new, or made by another program."""

    def write_spec(self, spec: StoreSpec) -> None:
        """Record in the store."""

    def list_changes(self, width: int) -> list[str]:
        """The changes that the table needs before items of `width` numbers are written, as statements or sentences.

        Raises SearchError for a table that cannot take pictures, whatever is changed.
        """

    def apply_changes(self, width: int) -> None:
        """Make the changes of `list_changes`: the table, or what it lacks."""

    def count(self, kind: Kind | None = None) -> int:
        """Rows with a vector, of one kind or of both."""

    def count_without_vector(self) -> int:
        """Rows without a vector, which no search finds."""

    def upsert(self, items: pa.Table) -> Upserted:
        """Write items of one kind (`make_items`) by their uid. A row of the other kind is never written over.

        Raises SearchError unless inserted + updated is the number of items.
        """

    def delete_images(self) -> int:
        """Delete all pictures. Returns their number."""

    def search(self, vector: Floats, top: int, kind: Kind, where: Where | None = None) -> pa.Table:
        """The `top` items of a kind with the highest cosine to a vector, [D], best first: uid, kind, text, source, vector."""

    def search_words(self, words: str, top: int, kind: Kind | None = None, where: Where | None = None) -> pa.Table:
        """The `top` items by full-text relevance, best first. Columns as `search`."""

    def read(self, uids: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
        """The items of these uids that are there, in any order. columns: of an item. None: all, thumbnails, too."""

    def sample(self, kind: Kind, count: int, seed: int = 0) -> pa.Table:
        """At most `count` items of a kind that have a vector, drawn by `draw_uids`: uid, text, vector."""

    def check_indexes(self, ann: Ann, full_text: bool, width: int) -> None:
        """Raise SearchError for indexes that `build` cannot make of vectors of `width` numbers. Nothing is written."""

    def build(self, ann: Ann, full_text: bool) -> list[str]:
        """Bring indexes up to date. Returns what there is now, as sentences. ann: `auto` makes one from ANN_ROWS rows."""

    def close(self) -> None:
        """Close connections. The store opens them again where it is used afterwards."""


def item_schema(width: int) -> pa.Schema:
    """The columns of an item."""
    return pa.schema(
        {
            "uid": pa.string(),  # first: older LanceDB lost merges by a later column
            "kind": pa.string(),
            "vector": pa.list_(pa.float32(), width),
            "text": pa.string(),
            "source": pa.string(),
            "thumbnail": pa.binary(),
        }
    )


HIT_COLUMNS = ("uid", "kind", "text", "source", "vector")
SAMPLE_COLUMNS = ("uid", "text", "vector")


def make_items(kind: Kind, uids: Sequence[str], vectors: Floats, **columns: Any) -> pa.Table:
    """Items of one kind. vectors: float [n, D], scaled to unit length here. columns: `text`, `source`, `thumbnail`."""
    schema = item_schema(vectors.shape[1])
    values = {
        "uid": pa.array(uids, pa.string()),
        "kind": pa.array([kind] * len(uids), pa.string()),
        "vector": as_column(scale_to_unit(vectors), schema.field("vector").type),
        **columns,
    }
    return pa.table(
        [values[field.name] if field.name in values else pa.nulls(len(uids), field.type) for field in schema],
        schema=schema,
    )


def read_unit_vectors(items: pa.Table) -> Floats:
    """The vectors of items, of unit length: float32 [n, D]. Rows without a direction are zeros or NaN."""
    return scale_to_unit(as_array(items["vector"]).astype("float32"))


def draw_uids(uids: Iterable[str], count: int, seed: int) -> list[str]:
    """At most `count` of the uids: those with the smallest hashes, so that a sample changes little when a table grows."""
    key = seed.to_bytes(8, "little")
    return heapq.nsmallest(count, uids, key=lambda uid: hashlib.blake2b(uid.encode(), digest_size=8, key=key).digest())


def check_where(where: Where | None, columns: Mapping[str, tuple[type, ...]]) -> dict[str, Value]:
    """The filter, checked. Raises SearchError for a column that is not there, and for a value of another type than the column's.

    columns: names, and the types of their values.
    """
    for column, value in (where or {}).items():
        if column not in columns:
            raise SearchError(f"where: there is no column {column!r} to filter by. There are {', '.join(columns)}")
        if value is not None and type(value) not in columns[column]:
            kinds = " or ".join(kind.__name__ for kind in columns[column])
            raise SearchError(f"where: column {column} is compared with {kinds}, or null, and not with {value!r}")
    return dict(where or {})


def check_written(name: str, given: int, written: Upserted) -> Upserted:
    """Raise SearchError where a store did not write what it was given."""
    if written.inserted + written.updated != given:
        raise SearchError(
            f"{name}: {given:,} items were given, and the store reports {written.inserted:,} new and {written.updated:,} "
            "updated ones. Another program may write uids of the same names: run the same command again"
        )
    return written


def refuse_twice(uids: Sequence[str], where: str) -> None:
    """Raise SearchError for a uid that comes twice."""
    if len(set(uids)) < len(uids):
        twice = sorted(uid for uid, count in Counter(uids).items() if count > 1)
        raise SearchError(f"{where}: {len(twice):,} uids come twice: {first_few(twice)}. A uid names one row")

"""What `nev index` will do, and all that it refuses: checked before the first write.

Text vectors that are there are never changed, pictures of two vision encoders are never mixed, and a uid names one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from nev.common.errors import first_few
from nev.data.vectors import VectorSpec, as_array, iterate_vectors, list_vector_files, read_spec, read_vectors
from nev.ops.vectors import are_usable
from nev.search.encoder_check import Agreement, check_encoder
from nev.search.store import IMAGE, TEXT, Ann, Kind, SearchError, StoreSpec, VectorStore, refuse_twice
from nev.search.texts_file import Texts, read_texts

if TYPE_CHECKING:
    from nev.inference.model import Model

CHUNK = 4096  # uids that are looked up at a time


@dataclass(frozen=True)
class Options:
    """What is to be done.

    images: a folder of vector files. texts: a file of texts.
    ann, full_text: indexes to make. full_text: None makes one for a new table.
    alter_table: permission to add columns to a table that exists.
    replace_images: delete the pictures that are there first. replace_texts: texts with other words are written over.
    unverified: the caller vouches that the table's vectors are of the model's text encoder.
    """

    images: str | None = None
    texts: str | None = None
    ann: Ann = "auto"
    full_text: bool | None = None
    alter_table: bool = False
    replace_images: bool = False
    replace_texts: bool = False
    unverified: bool = False


@dataclass(frozen=True)
class Plan:
    """What will be done.

    is_new: there is no table yet. changes: to the table, as statements or sentences.
    agreement: of the table's vectors with the model's, where they were compared. is_vouched: the caller vouches for them.
    images: pictures to write. bad_images: pictures whose vector has no direction, left out.
    texts: texts to embed. same_texts: texts that are there with the same words. empty_texts: texts without words, left out.
    deleted_images: pictures that are there, and are deleted first.
    """

    is_new: bool
    changes: list[str]
    agreement: Agreement | None
    is_vouched: bool
    images: int
    bad_images: int
    texts: int
    same_texts: int
    empty_texts: int
    deleted_images: int


@dataclass
class Task:
    """One filling of a table. load_model: None where the caller has named none."""

    store: VectorStore
    options: Options
    load_model: Callable[[], Model] | None = None

    @cached_property
    def model(self) -> Model:
        """The model. Raises SearchError where the caller has named none."""
        if self.load_model is None:
            why = (
                "texts are embedded by it"
                if self.options.texts
                else "nothing records which text encoder made this table"
            )
            raise SearchError(f"{self.store.name}: name the model (--model), since {why}")
        return self.load_model()

    @cached_property
    def vector_spec(self) -> VectorSpec | None:
        """Which model made the pictures' vectors."""
        if self.options.images is None:
            return None
        first = list_vector_files(self.options.images)[0]
        spec = read_spec(read_vectors(first, []).schema, first)
        if spec.precision == "binary":
            raise SearchError(
                f"{first}: binary vectors are compared by Hamming distance, and an index of texts and pictures by cosine. Embed "
                "the pictures again with --precision float16 or int8"
            )
        return spec

    @cached_property
    def text_file(self) -> Texts:
        """The texts to be written."""
        return read_texts(self.options.texts) if self.options.texts else Texts([], [], 0)

    @property
    def text_fingerprint(self) -> str:
        """Fingerprint of the text encoder of what is to be written."""
        return self.vector_spec.text_fingerprint if self.vector_spec else self.model.text_fingerprint

    @cached_property
    def width(self) -> int:
        """Numbers of a vector. Raises SearchError where the table's differ."""
        stored = self.store.width
        if self.vector_spec is None:
            return stored or self.model.width
        if stored not in (None, self.vector_spec.width):
            raise SearchError(
                f"{self.store.name} has vectors of {stored} numbers, and {self.options.images} of {self.vector_spec.width}: "
                "they are of different models, or of different widths of a model"
            )
        return self.vector_spec.width


def make_plan(task: Task) -> Plan:
    """Check everything. Raises SearchError for what cannot be done. Nothing is written."""
    store, options = task.store, task.options
    if not options.images and not options.texts:
        raise SearchError("nothing to index: give vector files of pictures (--images), texts (--texts), or both")
    if options.replace_images and not options.images:
        raise SearchError("--replace-images writes others in their place: give vector files (--images)")
    is_new, changes = store.width is None, store.list_changes(task.width)
    store.check_indexes(options.ann, bool(options.full_text), task.width)
    recorded = store.read_spec()
    _check_model(task)
    _check_images_model(task, recorded)
    if options.texts and not store.takes_texts:
        raise SearchError(
            f"{store.name}: uids of texts are no strings here, so the program that owns the table adds its texts. nev adds "
            "pictures"
        )
    is_recorded = bool(recorded and recorded.text_fingerprint) and not store.is_remade
    is_known = is_new or is_recorded or not store.count(TEXT)
    agreement = _check_text_encoder(task, recorded, is_known)
    if changes and not is_new and not options.alter_table:
        listed = "".join(f"\n  {change}" for change in changes)
        raise SearchError(
            f"{store.name} lacks what pictures need. --alter-table permits nev to make these changes; or make them "
            f"yourself:{listed}"
        )
    deleted = store.count(IMAGE) if options.replace_images and not is_new else 0
    images, bad_images = _check_images(task, is_new)
    texts, same_texts = _check_texts(task, is_new)
    is_vouched = options.unverified and not is_known
    empty = task.text_file.empty
    return Plan(is_new, changes, agreement, is_vouched, images, bad_images, texts, same_texts, empty, deleted)


def _check_model(task: Task) -> None:
    """Raise SearchError where the vector files are of another model than the caller has named."""
    spec = task.vector_spec
    if spec is None or task.load_model is None:
        return
    if spec.text_fingerprint != task.model.text_fingerprint:
        raise SearchError(
            f"{task.options.images} holds vectors of {spec.model}, whose text encoder is another one than that of "
            f"{task.model.spec.name}: name the model that made them, or embed the pictures by this one"
        )
    if spec.fingerprint != task.model.fingerprint:
        raise SearchError(
            f"{task.options.images} holds vectors of {spec.model} (vision tower {spec.fingerprint[:12]}), and --model is "
            f"{task.model.spec.name} ({task.model.fingerprint[:12]}): name the model that made them, or embed the pictures by "
            "this one"
        )


def _check_images_model(task: Task, recorded: StoreSpec | None) -> None:
    """Raise SearchError where pictures of two vision towers would be mixed, or pictures deleted that nev has not written."""
    spec, store = task.vector_spec, task.store
    if spec is None or store.width is None:
        return
    stored = recorded.fingerprint if recorded else None
    if stored == spec.fingerprint or not (count := store.count(IMAGE)):
        return
    if recorded is None or stored is None:
        raise SearchError(
            f"{store.name} has {count:,} rows that say they are pictures ({store.columns.kind} = 'image'), and nev has not "
            "written them. nev neither mixes its pictures with them nor deletes them: name another column by --kind-column, or "
            "take another table"
        )
    if not task.options.replace_images:
        raise SearchError(
            f"{store.name} has {count:,} pictures of {recorded.model} ({stored[:12]}), and {task.options.images} is of "
            f"{spec.model} ({spec.fingerprint[:12]}). Vectors of two vision encoders cannot be compared. --replace-images "
            "deletes the pictures that are there first"
        )


def _check_text_encoder(task: Task, recorded: StoreSpec | None, is_known: bool) -> Agreement | None:
    """Raise SearchError where another text encoder made the table. Returns what was compared, if anything.

    is_known: the encoder is recorded, or there is no text yet.
    """
    stored = recorded.text_fingerprint if recorded else None
    if stored and stored != task.text_fingerprint:
        raise SearchError(
            f"{task.store.name} holds vectors of the text encoder {stored[:12]}, as is recorded there, and the model's is "
            f"{task.text_fingerprint[:12]}: their vectors cannot be compared. Choose a model of that encoder, or another table"
        )
    return None if is_known or task.options.unverified else check_encoder(task.store, task.model, task.width)


def _check_images(task: Task, is_new: bool) -> tuple[int, int]:
    """The number of pictures, and of those without a direction. Raises SearchError for a uid that comes twice, or is a text's."""
    if task.options.images is None:
        return 0, 0
    uids, bad = list[str](), 0
    for table in iterate_vectors(task.options.images, ["uid", "vector"]):
        usable = are_usable(as_array(table["vector"]).astype(np.float32))
        uids += table["uid"].filter(pa.array(usable)).to_pylist()
        bad += int((~usable).sum())
    refuse_twice(uids, task.options.images)
    if both := sorted(set(uids) & set(task.text_file.uids)):
        raise SearchError(f"{len(both):,} uids are of pictures and of texts: {first_few(both)}. A uid names one row")
    if not is_new and (texts := find_rows(task.store, uids, TEXT)):
        raise SearchError(
            f"{task.store.name}: {len(texts):,} uids of pictures are of texts there: {first_few(sorted(texts))}. A picture never "
            "takes the place of a text: give the pictures other uids"
        )
    return len(uids), bad


def _check_texts(task: Task, is_new: bool) -> tuple[int, int]:
    """The number of texts to embed, and of those that are there. Raises SearchError for uids of pictures, and for other words."""
    uids = task.text_file.uids
    if is_new or not uids:
        return len(uids), 0
    if images := find_rows(task.store, uids, IMAGE):
        raise SearchError(
            f"{task.store.name}: {len(images):,} uids of texts are of pictures there: {first_few(sorted(images))}"
        )
    stored = find_rows(task.store, uids, TEXT)
    changed = [
        uid for uid, text in zip(uids, task.text_file.texts, strict=True) if uid in stored and stored[uid] != text
    ]
    if changed and not task.options.replace_texts:
        raise SearchError(
            f"{task.store.name}: {len(changed):,} texts are there with other words: {first_few(changed)}. --replace-texts writes "
            "the new words and their vectors over them"
        )
    return len(uids) - len(stored) + len(changed), len(stored) - len(changed)


def find_rows(store: VectorStore, uids: Sequence[str], kind: Kind) -> dict[str, str | None]:
    """The texts of the rows of a kind with these uids."""
    texts = {}
    for start in range(0, len(uids), CHUNK):
        rows = store.read(uids[start : start + CHUNK], ["uid", "kind", "text"]).to_pylist()
        texts.update({row["uid"]: row["text"] for row in rows if row["kind"] == kind})
    return texts

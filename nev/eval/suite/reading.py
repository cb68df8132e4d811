"""From the source of a task to pixels: units of work, and how a unit becomes blocks of decoded pictures. No Ray here.

A set is read in the parts that its source has (`nev.data.sources`). Where the parts are fewer than the processes, several
processes share a part: each of them reads the whole part, and decodes every n-th batch.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nev.config.base import ConfigError
from nev.config.data import Limits
from nev.data.augment import eval_view, seeded_random
from nev.data.block import Block, allocate_block
from nev.data.decode import BadImage, Picture, read_header
from nev.data.labels import read_class_names
from nev.data.rows import Row, parse_captions
from nev.data.sources import SOURCES, Source, SourceOptions, folder
from nev.data.sources.common import Part, hash_content
from nev.eval.suite.corruptions import CORRUPTIONS, SEVERITIES, STRENGTHS, corrupt
from nev.eval.suite.schema import Task
from nev.storage.files import join

# Version of the view: how a picture becomes what the model sees. A change makes cached vectors invalid.
VERSION = 1
PART_BYTES = 64 * 2**20
UNIT_BYTES = 2 * 2**20  # bytes of a part for each process that reads the part
MOST_READERS = 8  # processes that share a part
BATCH = 128
CLEAN = 0


class Unit(NamedTuple):
    """A piece of work: batches first, first + of, ... of a part.

    part: number of the part. content: the part, as the source's `read` takes it.
    """

    part: int
    content: Any
    first: int
    of: int


class View(NamedTuple):
    """How pictures are prepared.

    size: side S in pixels. limits: of what is decoded. share: of the rows, drawn by uid. corrupt: corrupted variants follow.
    """

    size: int
    limits: Limits
    share: float
    corrupt: bool


class Reading(NamedTuple):
    """How a set is read.

    read: the rows of a part.
    key: a hash of what is read and how, for a cache.
    names, templates: of the classes, where the data has them.
    """

    units: list[Unit]
    read: Callable[[Any], Iterable[Row]]
    view: View
    key: str
    names: tuple[str, ...] | None = None
    templates: tuple[str, ...] | None = None


def make_reading(task: Task, root: str, size: int, limits: Limits, processes: int) -> Reading:
    """How to read a task's source.

    root: folder or S3 prefix of the suite. size: side S of the pictures. processes: that read at a time.
    Raises ConfigError for data that is absent.
    """
    source_config, where = task.source, resolve_input(task.source.input, root)
    names = templates = None
    extra = (task.group.field,) if task.group else ()
    options = SourceOptions(
        columns=source_config.columns,
        label_name=source_config.label_name,
        captioned=False,
        caption_lines=source_config.format == "clip-benchmark",
        extra=extra,
        limits=limits,
        part_bytes=PART_BYTES,
    )
    if source_config.format == "winogavil":
        source = _winogavil(where, limits)
    elif source_config.format == "clip-benchmark":
        source = SOURCES["webdataset"]([join(where, "test")], options)
        names = read_lines(join(where, "classnames.txt"))
        templates = read_lines(join(where, "zeroshot_classification_templates.txt"))
        templates = templates and tuple(template.replace("{c}", "{}") for template in templates)
    else:
        source = SOURCES[source_config.format]([where], options)
    view = View(size, limits, source_config.share, task.kind == "robustness")
    return Reading(_make_units(source, processes), source.read, view, _hash_reading(source, view), names, templates)


def resolve_input(location: str, root: str) -> str:
    """The location itself where it is absolute, else below `root`."""
    return location if "://" in location or location.startswith("/") else join(root, location)


def blocks(unit: Unit, read: Callable[[Any], Iterable[Row]], view: View) -> Iterator[Block]:
    """The batches of a unit as blocks of b rows, a block for each variant: the clean one, and the corrupted ones on demand.

    image: uint8 [b, S, S, 3], 0 where not valid; valid: bool; label: int64, -1 if unknown; variant: int64, CLEAN or one more
    than the position in `corruption_variants()`; order: int64, of the row in the part; part: int64; facts: str, JSON of
    uid, captions, name, extra, reason.
    """
    rows = iter(read(unit.content))
    number = 0
    while batch := list(islice(rows, BATCH)):
        if number % unit.of == unit.first:
            numbered = enumerate(batch, start=number * BATCH)
            drawn = [(order, row) for order, row in numbered if _is_drawn(row["uid"], view.share)]
            if drawn:
                yield from _decode(drawn, unit.part, view)
        number += 1


def read_pictures(reading: Reading, uids: Collection[str]) -> dict[str, Picture]:
    """What the model sees of the rows with these uids: uint8 [S, S, 3] by uid, without pictures that cannot be decoded.

    Parts are read until every row is there.
    """
    pictures: dict[str, Picture] = {}
    for unit in reading.units:
        if unit.first or len(pictures) == len(uids):
            continue
        for row in reading.read(unit.content):
            if row["uid"] in uids and row["uid"] not in pictures:
                out = allocate_block(1, reading.view.size)[0]
                if not _view(row, reading.view, out):
                    pictures[row["uid"]] = out
                if len(pictures) == len(uids):
                    break
    return pictures


def corruption_variants() -> list[tuple[str, int]]:
    """(corruption, severity) of each variant, in the order of their numbers."""
    return [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]


def _decode(numbered: list[tuple[int, Row]], part: int, view: View) -> Iterator[Block]:
    """The block of some rows, and one for each corruption. numbered: (order, row)."""
    count = len(numbered)
    block: Block = {
        "image": allocate_block(count, view.size),
        "valid": np.zeros(count, np.bool_),
        "label": np.array([-1 if (label := row.get("label")) is None else label for _, row in numbered], np.int64),
        "order": np.array([order for order, _ in numbered], np.int64),
        "part": np.full(count, part, np.int64),
        "variant": np.full(count, CLEAN, np.int64),
        "facts": np.empty(count, object),
    }
    for place, (_, row) in enumerate(numbered):
        reason = _view(row, view, block["image"][place])
        block["valid"][place] = not reason
        block["facts"][place] = _facts_to_json(row, reason)
    yield block
    for number, (name, severity) in enumerate(corruption_variants() if view.corrupt else [], start=1):
        pictures = [
            corrupt(image, name, severity, seeded_random(severity, 0, row["uid"], name))
            for image, (_, row) in zip(block["image"], numbered, strict=True)
        ]
        variant, facts = np.full(count, number, np.int64), np.full(count, "", object)
        yield {**block, "image": np.stack(pictures), "variant": variant, "facts": facts}


def _view(row: Row, view: View, out: Any) -> str:
    """Decode a row's picture into `out`. Returns why the picture cannot be decoded; an empty string where it can."""
    out[:] = 0
    if "reject" in row:
        return row["reject"]
    try:
        eval_view(read_header(row["image"] or b"", view.limits), out)
    except BadImage as bad:
        out[:] = 0
        return str(bad)
    return ""


def _facts_to_json(row: Row, reason: str) -> str:
    """The fields of a row without its picture, as JSON. Half a surrogate pair, of a caption cut to a length, becomes `?`."""
    facts = {
        "uid": row["uid"],
        "captions": parse_captions(row["caption"]),
        "name": row.get("label_name"),
        "extra": {name: _plain(value) for name, value in row.get("extra", {}).items()},
        "reason": reason,
    }
    return json.dumps(facts, ensure_ascii=False, default=str).encode("utf-8", "replace").decode()


def _plain(value: Any) -> Any:
    """A value for JSON: the numbers of a tar member in numpy's format, the text of another tar member."""
    if not isinstance(value, bytes):
        return value
    if not value.startswith(np.lib.format.MAGIC_PREFIX):
        return value.decode(errors="replace")
    stream = io.BytesIO(value)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kind = read(stream)
    except ValueError:
        return None
    rest = stream.read()
    if kind.kind not in "biuf" or math.prod(shape) * kind.itemsize != len(rest):
        return None
    return np.frombuffer(rest, kind).tolist()


def _is_drawn(uid: str, share: float) -> bool:
    """Whether a row is in the share. The uid alone decides, so all models are scored on the same rows."""
    return share == 1 or seeded_random(0, 0, uid, "share").random() < share


def _make_units(source: Source, processes: int) -> list[Unit]:
    """The units of a source: about two for each process. Each unit of a part reads the bytes of the whole part."""
    parts = list(source.parts)
    wanted = -(-2 * processes // max(1, len(parts)))
    of = max(1, min(wanted, MOST_READERS, source.nbytes // max(1, len(parts)) // UNIT_BYTES))
    return [Unit(number, part.content, first, of) for number, part in enumerate(parts) for first in range(of)]


def _hash_reading(source: Source, view: View) -> str:
    """sha256 (hex) of what decides the vectors, beside the model."""
    parts = [
        VERSION,
        source.spec,
        [part.stamp for part in source.parts],
        view.size,
        view.limits.model_dump(),
        view.share,
    ]
    return hashlib.sha256(json.dumps([*parts, STRENGTHS if view.corrupt else None]).encode()).hexdigest()


def read_lines(location: str) -> tuple[str, ...] | None:
    """The lines of a text file, without outer white space; None for an absent file. Raises ConfigError for a blank line."""
    lines = read_class_names(location)
    return lines and tuple(line.strip() for line in lines.names)


def _winogavil(home: str, limits: Limits) -> Source:
    """The pictures of WinoGAViL, in `images/` of a local folder. A uid is a file's name without its ending."""
    if "://" in home:
        raise ConfigError(
            f"{home}: WinoGAViL is read from local disks alone. Copy the data here, and give the folder as the task's input."
        )
    images = Path(home, "images")
    files = sorted(file for file in images.glob("*.*") if not file.name.startswith((".", "_")))
    if not files:
        raise ConfigError(
            f"{images}: no pictures. The pictures of WinoGAViL belong there, with test.jsonl beside the folder."
        )
    pictures = [
        folder.Picture({"uid": file.stem, "image": None, "caption": None}, str(images), str(file)) for file in files
    ]
    entries = [file.stat() for file in files]
    stamps = [[str(file), entry.st_size, entry.st_mtime_ns] for file, entry in zip(files, entries, strict=True)]
    size = folder.PART_PICTURES
    parts = [
        Part(hash_content(stamps[at : at + size]), pictures[at : at + size]) for at in range(0, len(pictures), size)
    ]
    nbytes = sum(entry.st_size for entry in entries)
    return Source(parts, partial(folder.read, limits=limits), nbytes, {"source": "winogavil"})

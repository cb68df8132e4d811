"""From a task's source to pixels: which pieces of work there are, and how one becomes blocks. No Ray in it, nothing is copied.

A set is read in the parts that its reader has (`nev.data.sources`). Where they are fewer than the processes, several share a
part: each reads it through and decodes its own batches of it.
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

# Of how a picture becomes what the model sees: raised when that changes, so that nothing kept before is taken for it.
VERSION = 1
PART_BYTES = 64 * 2**20
UNIT_BYTES = 2 * 2**20  # of a part, that are worth reading it once more
MOST_READERS = 8  # of one part
BATCH = 128
CLEAN = 0


class Unit(NamedTuple):
    """A piece of work: every `of`-th batch of a part, from the `first` on."""

    part: int
    content: Any
    first: int
    of: int


class View(NamedTuple):
    """What becomes of pictures: their side, the limits of what is decoded, the share of rows, whether they are corrupted."""

    size: int
    limits: Limits
    share: float
    corrupt: bool


class Reading(NamedTuple):
    """How a set is read: the rows of a part by `read`, as `blocks` of `view`.

    key: names what is read and how, for a cache; names, templates: what the data says of its classes.
    """

    units: list[Unit]
    read: Callable[[Any], Iterable[Row]]
    view: View
    key: str
    names: tuple[str, ...] | None = None
    templates: tuple[str, ...] | None = None


def make_reading(task: Task, root: str, size: int, limits: Limits, processes: int) -> Reading:
    """The reading of a task's source below `root`, for so many processes. Raises ConfigError for data that is not there."""
    given, where = task.source, resolve_input(task.source.input, root)
    names = templates = None
    extra = (task.group.field,) if task.group else ()
    options = SourceOptions(
        columns=given.columns,
        label_name=given.label_name,
        captioned=False,
        caption_lines=given.format == "clip-benchmark",
        extra=extra,
        limits=limits,
        part_bytes=PART_BYTES,
    )
    if given.format == "winogavil":
        source = _winogavil(where, limits)
    elif given.format == "clip-benchmark":
        source = SOURCES["webdataset"]([join(where, "test")], options)
        names = read_lines(join(where, "classnames.txt"))
        templates = read_lines(join(where, "zeroshot_classification_templates.txt"))
        templates = templates and tuple(template.replace("{c}", "{}") for template in templates)
    else:
        source = SOURCES[given.format]([where], options)
    view = View(size, limits, given.share, task.kind == "robustness")
    return Reading(_shared_out(source, processes), source.read, view, _key(source, view), names, templates)


def resolve_input(given: str, root: str) -> str:
    """Where an input lies: in `root`, unless it is absolute itself."""
    return given if "://" in given or given.startswith("/") else join(root, given)


def blocks(unit: Unit, read: Callable[[Any], Iterable[Row]], view: View) -> Iterator[Block]:
    """The unit's batches as blocks of b rows, once for each of a picture's variants (one where it is not corrupted).

    image: uint8 [b, S, S, 3], 0 where not valid; valid: bool; label: int64, -1 if unknown; variant: int64, CLEAN or one more
    than the position in `corruption_variants()`; order: int64, of the row in the part; part: int64; facts: str, JSON of
    uid, captions, name, extra, reason.
    """
    rows = iter(read(unit.content))
    number = 0
    while batch := list(islice(rows, BATCH)):
        if number % unit.of == unit.first:
            kept = [(at, row) for at, row in enumerate(batch, start=number * BATCH) if _drawn(row["uid"], view.share)]
            if kept:
                yield from _decoded(kept, unit.part, view)
        number += 1


def read_pictures(reading: Reading, uids: Collection[str]) -> dict[str, Picture]:
    """The views of some rows by their uids, uint8 [S, S, 3], of those that can be decoded: parts are read until all are found."""
    found: dict[str, Picture] = {}
    for unit in reading.units:
        if unit.first or len(found) == len(uids):
            continue
        for row in reading.read(unit.content):
            if row["uid"] in uids and row["uid"] not in found:
                out = allocate_block(1, reading.view.size)[0]
                if not _view(row, reading.view, out):
                    found[row["uid"]] = out
                if len(found) == len(uids):
                    break
    return found


def corruption_variants() -> list[tuple[str, int]]:
    """The corruptions and their severities, in the order of `variant`."""
    return [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]


def _decoded(kept: list[tuple[int, Row]], part: int, view: View) -> Iterator[Block]:
    block: Block = {
        "image": allocate_block(len(kept), view.size),
        "valid": np.zeros(len(kept), np.bool_),
        "label": np.array([-1 if (label := row.get("label")) is None else label for _, row in kept], np.int64),
        "order": np.array([at for at, _ in kept], np.int64),
        "part": np.full(len(kept), part, np.int64),
        "variant": np.full(len(kept), CLEAN, np.int64),
        "facts": np.empty(len(kept), object),
    }
    for place, (_, row) in enumerate(kept):
        reason = _view(row, view, block["image"][place])
        block["valid"][place] = not reason
        block["facts"][place] = _said(row, reason)
    yield block
    for number, (name, severity) in enumerate(corruption_variants() if view.corrupt else [], start=1):
        pictures = [
            corrupt(image, name, severity, seeded_random(severity, 0, row["uid"], name))
            for image, (_, row) in zip(block["image"], kept, strict=True)
        ]
        variant, facts = np.full(len(kept), number, np.int64), np.full(len(kept), "", object)
        yield {**block, "image": np.stack(pictures), "variant": variant, "facts": facts}


def _view(row: Row, view: View, out: Any) -> str:
    """Decode a row's picture into `out`. Returns why not, or nothing."""
    out[:] = 0
    if "reject" in row:
        return row["reject"]
    try:
        eval_view(read_header(row["image"] or b"", view.limits), out)
    except BadImage as bad:
        out[:] = 0
        return str(bad)
    return ""


def _said(row: Row, reason: str) -> str:
    """What a row says of itself, as JSON. Half a surrogate pair, where a caption was cut to a length, is a question mark."""
    facts = {
        "uid": row["uid"],
        "captions": parse_captions(row["caption"]),
        "name": row.get("label_name"),
        "extra": {name: _plain(value) for name, value in row.get("extra", {}).items()},
        "reason": reason,
    }
    return json.dumps(facts, ensure_ascii=False, default=str).encode("utf-8", "replace").decode()


def _plain(value: Any) -> Any:
    """What JSON can say: of a tar member that is an array of numpy's its numbers, of another one its text."""
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


def _drawn(uid: str, share: float) -> bool:
    """Whether a row is among the share: by its uid alone, so that every model is tried on the same rows."""
    return share == 1 or seeded_random(0, 0, uid, "share").random() < share


def _shared_out(source: Source, processes: int) -> list[Unit]:
    """Every part, in as many units as give each process two pieces of work; each unit reads its part's bytes anew."""
    parts = list(source.parts)
    wanted = -(-2 * processes // max(1, len(parts)))
    of = max(1, min(wanted, MOST_READERS, source.nbytes // max(1, len(parts)) // UNIT_BYTES))
    return [Unit(number, part.content, first, of) for number, part in enumerate(parts) for first in range(of)]


def _key(source: Source, view: View) -> str:
    """What the embeddings depend on beside the model."""
    seen = [
        VERSION,
        source.spec,
        [part.stamp for part in source.parts],
        view.size,
        view.limits.model_dump(),
        view.share,
    ]
    return hashlib.sha256(json.dumps([*seen, STRENGTHS if view.corrupt else None]).encode()).hexdigest()


def read_lines(location: str) -> tuple[str, ...] | None:
    """The lines of a text file without outer white space, None where there is none. Raises ConfigError for a blank one."""
    found = read_class_names(location)
    return found and tuple(line.strip() for line in found.names)


def _winogavil(home: str, limits: Limits) -> Source:
    """WinoGAViL's pictures: those of `images/` in a folder here, known by their names without the ending."""
    if "://" in home:
        raise ConfigError(
            f"{home}: WinoGAViL is read from disks alone. Copy it here, and give its folder as the task's input."
        )
    images = Path(home, "images")
    files = sorted(file for file in images.glob("*.*") if not file.name.startswith((".", "_")))
    if not files:
        raise ConfigError(f"{images}: no pictures. WinoGAViL's lie there, with test.jsonl beside the folder.")
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

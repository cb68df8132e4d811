"""A part of a corpus, from encoded pictures to its vector file, in one process: read, decode, embed, write. No Ray.

Pre-processing and vectors are those of `Model.encode_image`. Pictures that cannot be used are listed beside the file. The list is
written first: where a vector file is, its part is complete.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nev.config.data import Limits
from nev.data.prepare.order import DUPLICATE_UID
from nev.data.rows import Row, find_fault, parse_captions
from nev.data.sources import Part
from nev.data.vectors import VectorSpec, make_schema, make_table, open_writer
from nev.embed.output import PART_KEY, PartSpec, bad_location, count_reasons, part_location, writing_folder
from nev.embed.same_model import ModelPlace, load_same_model
from nev.embed.thumbnails import make_views
from nev.inference.forward import Embed, make_embedder
from nev.inference.pictures import Square
from nev.ops.vectors import Floats
from nev.storage.files import atomic_file
from nev.storage.reading import write_errors_as_data_errors

if TYPE_CHECKING:
    from nev.inference.model import Model

BAD_SCHEMA = pa.schema([("uid", pa.string()), ("source", pa.string()), ("reason", pa.string())])
GROUP_ROWS, GROUP_BYTES = 4096, 64 * 2**20  # of a row group: it is written when it has one of them
CPU_BATCH, GPU_BATCH = 16, 256  # pictures of a forward: on a CPU of 224 pixels a side, of smaller ones more
PROGRESS_S = 0.5


class PartJob(NamedTuple):
    """What is done with each part.

    output: folder of the vector files.
    read: the source's reader of a part.
    model: where the model is.
    spec: of the vector files.
    settings: of the input and the columns, for the metadata of the files (`PartSpec`).
    captions: whether rows have captions with which their pictures are compared.
    thumbnail: longest side of a thumbnail, in pixels; 0: none.
    batch_size: pictures of a forward. None: `choose_batch`.
    """

    output: str
    read: Callable[[Any], Iterable[Row]]
    model: ModelPlace
    spec: VectorSpec
    settings: dict[str, Any]
    captions: bool
    thumbnail: int
    batch_size: int | None

    @property
    def columns(self) -> list[str]:
        """The columns of a vector file beside `uid` and `vector`."""
        return ["source", *(["caption", "cosine"] if self.captions else []), *(["thumbnail"] if self.thumbnail else [])]


class Decoded(NamedTuple):
    """A row whose picture is decoded.

    thumbnail: JPEG. None where there is none.
    """

    uid: str
    source: str | None
    captions: list[str]
    square: Square
    thumbnail: bytes | None


def embed_part(part: Part, job: PartJob, device: str, threads: int) -> Iterator[int | PartSpec]:
    """Write the vector file of a part, complete or not at all. Yields numbers of rows as they are embedded; last, the record.

    threads: that decode, and that compute on a CPU.
    Raises ConfigError as the source's reader does, ModelError where this process opens another model, and DataError where the
    output cannot be written.
    """
    from nev.ops.threads import torch_threads

    model = load_same_model(job.model, device)
    location = part_location(job.output, part.stamp)
    batch_size = job.batch_size or choose_batch(device, model.spec.image_size)
    embed = make_embedder(model.vision, model.spec.mean, model.spec.std, model.device, batch_size)
    bad, seen, rows, waiting = list[dict[str, str | None]](), set[str](), 0, list[pa.Table]()
    unreported, reported_at = 0, time.monotonic()
    with (
        torch_threads(threads),
        write_errors_as_data_errors(location),
        open_writer(location, make_schema(job.spec, job.columns), writing_folder(job.output)) as writer,
    ):
        for batch in decode_batches(job.read(part.content), job, model, batch_size, threads):
            table = embed_batch(refuse_repeated(batch, seen), job, model, embed, bad)
            waiting.append(table)
            rows, unreported = rows + len(table), unreported + len(batch)
            if sum(map(len, waiting)) >= GROUP_ROWS or sum(each.nbytes for each in waiting) >= GROUP_BYTES:
                write_group(writer, waiting)
            if time.monotonic() - reported_at > PROGRESS_S:
                yield unreported
                unreported, reported_at = 0, time.monotonic()
        write_group(writer, waiting)
        write_bad(bad_location(job.output, part.stamp), bad)
        reasons = count_reasons(Counter(str(row["reason"]) for row in bad))
        record = PartSpec(stamp=part.stamp, settings=job.settings, rows=rows, bad=reasons)
        writer.add_key_value_metadata({PART_KEY: record.model_dump_json()})
    yield unreported
    yield record


def choose_batch(device: str, size: int) -> int:
    """Pictures of a forward that are fast on a device. size: S, side of a picture, in pixels.

    On a CPU the activations should stay in the cache, and the fixed cost of a forward should be small beside the pictures.
    """
    return GPU_BATCH if device != "cpu" else min(GPU_BATCH, max(CPU_BATCH, CPU_BATCH * 224**2 // size**2))


def decode_batches(
    rows: Iterable[Row], job: PartJob, model: Model, batch_size: int, threads: int
) -> Iterator[list[Decoded]]:
    """Read and decode the rows in another thread, a batch ahead of the caller. threads: that decode."""
    decode = functools.partial(
        decode_row, size=model.spec.image_size, limits=model.spec.limits, thumbnail=job.thumbnail
    )
    waiting = iter(rows)
    with ExitStack() as stack:
        decode_all = stack.enter_context(ThreadPoolExecutor(threads)).map if threads > 1 else map

        def read_batch() -> list[Decoded]:
            return list(decode_all(decode, islice(waiting, batch_size)))

        reader = stack.enter_context(ThreadPoolExecutor(1))
        batch = reader.submit(read_batch)
        while done := batch.result():
            batch = reader.submit(read_batch)
            yield done


def decode_row(row: Row, size: int, limits: Limits, thumbnail: int) -> Decoded:
    """Decode the picture of a row. The square of a row that cannot be used has the reason."""
    fault = find_fault(row, limits, captioned=False)
    uid = row["uid"].encode(errors="backslashreplace").decode()
    source = row.get("source")
    if source is not None:
        source = source.encode(errors="backslashreplace").decode()
    if fault:
        return Decoded(uid, source, [], Square(np.zeros((size, size, 3), np.uint8), fault), None)
    square, small = make_views(bytes(row["image"] or b""), size, limits, thumbnail)
    return Decoded(uid, source, parse_captions(row["caption"]), square, small)


def refuse_repeated(batch: list[Decoded], seen: set[str]) -> list[Decoded]:
    """The rows, of which those with the uid of an earlier row that can be used cannot. seen: such uids; new ones are added."""
    checked = []
    for row in batch:
        repeated = not row.square.reason and row.uid in seen
        checked.append(row._replace(square=row.square._replace(reason=DUPLICATE_UID)) if repeated else row)
        if not row.square.reason:
            seen.add(row.uid)
    return checked


def embed_batch(
    batch: list[Decoded], job: PartJob, model: Model, embed: Embed, bad: list[dict[str, str | None]]
) -> pa.Table:
    """The vectors of the rows that can be used, as a table; the others are added to `bad`."""
    from nev.inference.batches import encode_squares
    from nev.inference.output import finish

    vectors, reasons = encode_squares([row.square for row in batch], embed, model.width)
    bad += [
        {"uid": row.uid, "source": row.source, "reason": reason}
        for row, reason in zip(batch, reasons, strict=True)
        if reason
    ]
    usable = [number for number, reason in enumerate(reasons) if not reason]
    good, vectors = [batch[number] for number in usable], vectors[usable]
    columns: dict[str, list[Any]] = {"source": [row.source for row in good]}
    if job.captions:
        captions = [row.captions for row in good]
        columns |= {"caption": [some or None for some in captions], "cosine": best_cosines(model, vectors, captions)}
    if job.thumbnail:
        columns["thumbnail"] = [row.thumbnail for row in good]
    stored = finish(vectors, job.spec.width, job.spec.precision, "numpy", single=False)
    return make_table([row.uid for row in good], stored, job.spec, **columns)


def best_cosines(model: Model, vectors: Floats, captions: list[list[str]]) -> list[float | None]:
    """The largest cosine of each vector, [n, D], with its captions; None without captions. The prefix is that of training."""
    flat = [sentence for some in captions for sentence in some]
    if not flat:
        return [None] * len(captions)
    owner = np.repeat(np.arange(len(captions)), [len(some) for some in captions])
    cosines = np.einsum("nd,nd->n", model.encode_text(flat, progress=False), vectors[owner])
    best = np.full(len(captions), -np.inf, np.float32)
    np.maximum.at(best, owner, cosines)
    return [float(cosine) if some else None for cosine, some in zip(best, captions, strict=True)]


def write_group(writer: pq.ParquetWriter, waiting: list[pa.Table]) -> None:
    """Write the tables as one row group, and forget them."""
    if waiting:
        writer.write_table(pa.concat_tables(waiting))
        waiting.clear()


def write_bad(location: str, bad: list[dict[str, str | None]]) -> None:
    """Write the list of the rows that cannot be used. Without such rows there is no list."""
    if bad:
        with atomic_file(location) as partial:
            pq.write_table(pa.Table.from_pylist(bad, BAD_SCHEMA), partial)

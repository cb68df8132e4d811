"""The first stage of `prepare`: the rows of one part of the input, chosen, shrunk, and sorted into runs.

The order of a set is that of the digests of its rows: blake2b(uid, key = seed). It is as good as a random permutation, and
a function of the seed and the set of uids alone, so neither the order in which rows arrive nor who makes them shows.

A bucket is one of equal ranges of digests. A run is a file of rows, bucket after bucket, each bucket as Arrow IPC messages,
so that the rows of any range of digests are one range of bytes in every run. Runs are as large as memory allows. Beside its
runs a part has the digests of all its rows, in the order of the input, and, last, `part.json`, by which it is done.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nev.config.data import Limits
from nev.data import labels
from nev.data.labels import ClassNames, Names
from nev.data.prepare.filters import Filters, select
from nev.data.prepare.job_state import DAMAGED, Facts, write_json
from nev.data.prepare.resize import Resize, resize_image
from nev.data.prepare.shards import OPTIONAL, SCHEMA, build_table
from nev.data.rows import Row, parse_captions, usable_rows
from nev.data.sources.common import Part
from nev.data.uids import KEY, Keys
from nev.storage.files import filesystem, join, make_folder, write_atomic
from nev.storage.reading import DataError, read_errors_as_data_errors, write_errors_as_data_errors

ROW_OVERHEAD = 1024  # bytes of Python objects around one row, roughly; what `memory_bytes` counts beside the image
STRING_BYTES = 60  # of a string beside its characters
MESSAGE_BYTES = 32 * 2**20  # rows are copied into Arrow so many at a time
BUCKET_BYTES = 128 * 2**20
MAX_BUCKETS = 4096
RUN_SCHEMA = pa.schema([pa.field("digest", pa.binary(KEY.itemsize)), pa.field("row", pa.int64()), *SCHEMA])


class ScatterJob(NamedTuple):
    """How a part becomes runs. seed_key: of the digests; listed: the uids that stay; threads: that shrink pictures."""

    work: str
    read: Callable[[Any], Iterable[Row]]
    seed_key: bytes
    buckets: int
    memory_bytes: int
    limits: Limits
    filters: Filters
    allowed_uids: Keys | None
    resize: Resize | None
    threads: int
    class_names: ClassNames | None


class PartKeys(NamedTuple):
    """Of a part. digests: bytes [rows]; images: hashes, bytes [rows], or [0]; offsets: int64 [runs, buckets + 1], in bytes."""

    digests: Keys
    images: Keys
    offsets: NDArray[np.int64]


def seed_key(seed: int) -> bytes:
    """The key under which uids are hashed."""
    return hashlib.blake2b(str(seed).encode(), digest_size=16).digest()


def count_buckets(nbytes: int) -> int:
    """How many buckets an input of this size is scattered over."""
    return min(max(1, -(-nbytes // BUCKET_BYTES)), MAX_BUCKETS)


def assign_bucket(digest: bytes, buckets: int) -> int:
    """The bucket of a digest: buckets are in the order of digests."""
    return int.from_bytes(digest[:8], "big") * buckets >> 64


def scatter(part: Part, job: ScatterJob) -> Facts:
    """The task: read `part`, write its runs, keys and `part.json`; return what that one says.

    Raises ConfigError as the source's reader does, and where a label has two names.
    """
    read: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    names: Names = {}
    files: dict[str, int] = {}
    seen: set[str] = set()
    digests, images = bytearray(), bytearray()
    offsets: list[NDArray[np.int64]] = []
    folder = join(job.work, f"part-{part.stamp}")
    highest = -1
    make_folder(*filesystem(folder))
    chosen = select(
        usable_rows(_counted(job.read(part.content), read), dropped, job.limits),
        job.filters,
        job.limits,
        dropped,
        job.allowed_uids,
    )
    small = resize_image(chosen, job.resize, job.limits, dropped, job.threads) if job.resize else chosen
    for rows in batches_in_memory(labels.collect_names(small, names, job.known), job.memory_bytes):
        own = [
            hashlib.blake2b(row["uid"].encode(), digest_size=KEY.itemsize, key=job.seed_key).digest() for row in rows
        ]
        location = run_location(job.work, part.stamp, len(offsets))
        offsets.append(_write_run(location, rows, own, len(digests) // KEY.itemsize, job.buckets))
        files[location.removeprefix(f"{job.work}/")] = int(offsets[-1][-1])
        digests += b"".join(own)
        images += b"".join(row["image_hash"] for row in rows if "image_hash" in row)
        highest = max(highest, *(-1 if (label := row.get("label")) is None else label for row in rows))
        seen.update(name for name in OPTIONAL for row in rows if row.get(name) is not None)
        if any(len(parse_captions(row["caption"])) > 1 for row in rows):
            seen.add("captions")
    keys = PartKeys(
        np.frombuffer(digests, KEY),
        np.frombuffer(images, KEY),
        np.array(offsets, np.int64).reshape(-1, job.buckets + 1),
    )
    packed = io.BytesIO()
    np.savez(packed, **keys._asdict())
    with write_errors_as_data_errors(join(folder, "keys.npz")):
        write_atomic(join(folder, "keys.npz"), packed.getvalue())
    files[f"part-{part.stamp}/keys.npz"] = len(packed.getvalue())
    done = {
        "stamp": part.stamp,
        "rows_in": read["rows"],
        "rows": len(keys.digests),
        "dropped": dict(dropped),
        "seen": sorted(seen),
        "names": [[label, *named] for label, named in names.items()],
        "highest": highest,
        "buckets": job.buckets,
        "files": files,
    }
    write_json(join(folder, "part.json"), done)
    return done


def run_location(work: str, stamp: str, run: int) -> str:
    """Path or URL of a run of the part with this stamp."""
    return join(work, f"part-{stamp}", f"run-{run:05d}")


def fetch_keys(work: str, part: str) -> bytes:
    """The file of keys of a part that is done."""
    location = _keys_location(work, part)
    fs, path = filesystem(location)
    with read_errors_as_data_errors(location, DAMAGED):
        content: bytes = fs.cat_file(path)
    return content


def read_keys(content: bytes, work: str, part: str) -> PartKeys:
    """What is in that file. For one thread: NumPy parses its headers by `ast`, which Python 3.11 cannot do in several at once."""
    try:
        with np.load(io.BytesIO(content)) as arrays:
            return PartKeys(*(arrays[name] for name in PartKeys._fields))
    except (BadZipFile, zlib.error, ValueError, KeyError, EOFError) as error:
        raise DataError(f"{_keys_location(work, part)} is damaged ({error}). {DAMAGED}") from error


def _keys_location(work: str, stamp: str) -> str:
    return join(work, f"part-{stamp}", "keys.npz")


def batches_in_memory(rows: Iterable[Row], memory_bytes: int) -> Iterator[list[Row]]:
    """The rows in lists, each as long as memory allows. A list is emptied when the next one is asked for."""
    some: list[Row] = []
    size = 0
    for row in rows:
        some.append(row)
        said = sum(STRING_BYTES + len(caption) for caption in parse_captions(row["caption"]))
        size += len(row["image"] or b"") + said + ROW_OVERHEAD
        if size >= memory_bytes:
            yield some
            some.clear()
            size = 0
    if some:
        yield some


def _counted(rows: Iterable[Row], read: Counter[str]) -> Iterator[Row]:
    for row in rows:
        read["rows"] += 1
        yield row


def _write_run(location: str, rows: list[Row], digests: list[bytes], first: int, buckets: int) -> NDArray[np.int64]:
    """Write rows, the first of which is row `first` of its part; return where each bucket begins and the last one ends."""
    sizes = np.zeros(buckets + 1, np.int64)
    fs, path = filesystem(location)
    order = sorted(range(len(rows)), key=digests.__getitem__)
    with write_errors_as_data_errors(location), fs.open(path, "wb") as sink:
        for bucket, members in groupby(order, key=lambda at: assign_bucket(digests[at], buckets)):
            places = list(members)
            start = 0
            for some in batches_in_memory((rows[at] for at in places), MESSAGE_BYTES):
                table = build_table(some, SCHEMA)
                own = places[start : start + len(some)]
                start += len(some)
                columns = [
                    pa.array([digests[at] for at in own], RUN_SCHEMA.field("digest").type),
                    pa.array([first + at for at in own]),
                ]
                for batch in pa.table([*columns, *table.columns], schema=RUN_SCHEMA).to_batches():
                    sizes[bucket + 1] += sink.write(batch.serialize())
    return np.cumsum(sizes)


def read_batches(content: pa.Buffer) -> Iterator[pa.RecordBatch]:
    """The record batches of a range of buckets. Raises ArrowInvalid for bytes that are no such thing."""
    source = pa.BufferReader(content)
    while source.tell() < content.size:
        try:
            message = pa.ipc.read_message(source)
        except EOFError as error:  # what Arrow says to a message of no length
            raise pa.ArrowInvalid(f"no rows at byte {source.tell()} of {content.size}") from error
        yield pa.ipc.read_record_batch(message, RUN_SCHEMA)

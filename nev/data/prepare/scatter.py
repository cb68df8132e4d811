"""The first stage of `prepare`: the rows of one part of the input are filtered, shrunk, and sorted into runs.

The rows of a set are ordered by their digests, blake2b(uid, key = seed). This order is as good as a random permutation. It
depends on the seed and the set of uids alone, not on the order of the input or on the number of processes.

A bucket is one of equally large ranges of digests. A run is a file of rows, bucket after bucket, each bucket as Arrow IPC
messages. So the rows of a range of digests are one range of bytes in every run. Runs are as large as memory allows. A part also
has a file with the digests of all its rows, in the order of the input, and `part.json`, which is written last and marks the
part as finished.
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
from nev.data.prepare.job_state import DAMAGED, Record, write_json
from nev.data.prepare.resize import Resize, resize_image
from nev.data.prepare.shards import OPTIONAL, SCHEMA, build_table
from nev.data.rows import Row, parse_captions, usable_rows
from nev.data.sources.common import Part
from nev.data.uids import KEY, Keys
from nev.storage.files import filesystem, join, make_folder, write_atomic
from nev.storage.reading import DataError, read_errors_as_data_errors, write_errors_as_data_errors

ROW_OVERHEAD = 1024  # bytes of a row's Python objects beside image and captions, roughly
STRING_BYTES = 60  # bytes of a Python string beside its characters
MESSAGE_BYTES = 32 * 2**20  # bytes of rows that become one Arrow message
BUCKET_BYTES = 128 * 2**20
MAX_BUCKETS = 4096
RUN_SCHEMA = pa.schema([pa.field("digest", pa.binary(KEY.itemsize)), pa.field("row", pa.int64()), *SCHEMA])


class ScatterJob(NamedTuple):
    """The settings of the first stage.

    work: folder of intermediate files.
    read: the source's reader of a part.
    seed_key: key of the digests.
    buckets: number of buckets.
    memory_bytes: bytes of rows in memory before they are written.
    limits: of an encoded image.
    filters: conditions on rows.
    allowed_uids: keys of the uids to keep. None: all.
    resize: how pictures are shrunk. None: not at all.
    threads: threads that shrink pictures.
    class_names: the classes.txt beside the output. None: there is none.
    """

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
    """The keys of a part.

    digests: bytes [rows].
    images: hashes of the images, bytes [rows]; bytes [0] where duplicates are allowed.
    offsets: int64 [runs, buckets + 1], where each bucket starts and the last one ends in a run, in bytes.
    """

    digests: Keys
    images: Keys
    offsets: NDArray[np.int64]


def hash_seed(seed: int) -> bytes:
    """The key with which uids are hashed."""
    return hashlib.blake2b(str(seed).encode(), digest_size=16).digest()


def count_buckets(nbytes: int) -> int:
    """The number of buckets for an input of this size."""
    return min(max(1, -(-nbytes // BUCKET_BYTES)), MAX_BUCKETS)


def assign_bucket(digest: bytes, buckets: int) -> int:
    """The bucket of a digest. Buckets have the order of digests."""
    return int.from_bytes(digest[:8], "big") * buckets >> 64


def scatter(part: Part, job: ScatterJob) -> Record:
    """The task: read `part`, and write its runs, keys and `part.json`. Returns the content of `part.json`.

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
    for rows in batches_in_memory(labels.collect_names(small, names, job.class_names), job.memory_bytes):
        run_digests = [
            hashlib.blake2b(row["uid"].encode(), digest_size=KEY.itemsize, key=job.seed_key).digest() for row in rows
        ]
        location = run_location(job.work, part.stamp, len(offsets))
        offsets.append(_write_run(location, rows, run_digests, len(digests) // KEY.itemsize, job.buckets))
        files[location.removeprefix(f"{job.work}/")] = int(offsets[-1][-1])
        digests += b"".join(run_digests)
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
    record = {
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
    write_json(join(folder, "part.json"), record)
    return record


def run_location(work: str, stamp: str, run: int) -> str:
    """Path or URL of run number `run` of the part with this stamp."""
    return join(work, f"part-{stamp}", f"run-{run:05d}")


def fetch_keys(work: str, part: str) -> bytes:
    """Read the bytes of a finished part's keys.npz."""
    location = _keys_location(work, part)
    fs, path = filesystem(location)
    with read_errors_as_data_errors(location, DAMAGED):
        content: bytes = fs.cat_file(path)
    return content


def read_keys(content: bytes, work: str, part: str) -> PartKeys:
    """Parse the bytes of a keys.npz. Call this in one thread only: NumPy uses `ast`, which is not thread-safe in Python 3.11."""
    try:
        with np.load(io.BytesIO(content)) as arrays:
            return PartKeys(*(arrays[name] for name in PartKeys._fields))
    except (BadZipFile, zlib.error, ValueError, KeyError, EOFError) as error:
        raise DataError(f"{_keys_location(work, part)} is damaged ({error}). {DAMAGED}") from error


def _keys_location(work: str, stamp: str) -> str:
    return join(work, f"part-{stamp}", "keys.npz")


def batches_in_memory(rows: Iterable[Row], memory_bytes: int) -> Iterator[list[Row]]:
    """Yield the rows in lists of about `memory_bytes`. A list is cleared before the next list is filled."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        caption_bytes = sum(STRING_BYTES + len(caption) for caption in parse_captions(row["caption"]))
        size += len(row["image"] or b"") + caption_bytes + ROW_OVERHEAD
        if size >= memory_bytes:
            yield batch
            batch.clear()
            size = 0
    if batch:
        yield batch


def _counted(rows: Iterable[Row], read: Counter[str]) -> Iterator[Row]:
    for row in rows:
        read["rows"] += 1
        yield row


def _write_run(location: str, rows: list[Row], digests: list[bytes], first: int, buckets: int) -> NDArray[np.int64]:
    """Write a run. Returns where each bucket starts and the last bucket ends, in bytes: int64 [buckets + 1].

    first: number of the first row in its part.
    """
    sizes = np.zeros(buckets + 1, np.int64)
    fs, path = filesystem(location)
    order = sorted(range(len(rows)), key=digests.__getitem__)
    with write_errors_as_data_errors(location), fs.open(path, "wb") as sink:
        for bucket, members in groupby(order, key=lambda number: assign_bucket(digests[number], buckets)):
            numbers = list(members)
            start = 0
            for message_rows in batches_in_memory((rows[number] for number in numbers), MESSAGE_BYTES):
                table = build_table(message_rows, SCHEMA)
                in_message = numbers[start : start + len(message_rows)]
                start += len(message_rows)
                columns = [
                    pa.array([digests[number] for number in in_message], RUN_SCHEMA.field("digest").type),
                    pa.array([first + number for number in in_message]),
                ]
                for batch in pa.table([*columns, *table.columns], schema=RUN_SCHEMA).to_batches():
                    sizes[bucket + 1] += sink.write(batch.serialize())
    return np.cumsum(sizes)


def read_batches(content: pa.Buffer) -> Iterator[pa.RecordBatch]:
    """The record batches of a range of buckets. Raises ArrowInvalid for damaged bytes."""
    source = pa.BufferReader(content)
    while source.tell() < content.size:
        try:
            message = pa.ipc.read_message(source)
        except EOFError as error:  # Arrow raises this for a message without length
            raise pa.ArrowInvalid(f"no rows at byte {source.tell()} of {content.size}") from error
        yield pa.ipc.read_record_batch(message, RUN_SCHEMA)

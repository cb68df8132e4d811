"""Four ways to feed one consumer on this machine, each measured in a process of its own: images/s after a warm-up.

All give batches of `BLOCK` rows, crop with the same scale, and read the same pictures; nev's and the DataLoader's are uint8,
open_clip's are normalised floats, as its transform makes them.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Generator, Iterator
from multiprocessing import get_context, set_start_method
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from benchmarks.contestants.pictures import BLOCK, KEY, WIDTH, Pictures
from nev.config.data import Augment, Columns, Limits
from nev.data.augment import seeded_random, train_view
from nev.data.block import BlockReader
from nev.data.decode import read_header
from nev.data.index import build_index
from nev.data.plan import Plan, choose_window

# Of a stream, that no rate counts: Ray Data fills what it may hold, and the decoding processes touch the pages of the object
# store for the first time.
WARM_UP_S = 5.0
MEASURED_S = 10.0
START = 16  # batches of a stream whose start alone is measured: as many windows as there are processes, or more
MANY = 4_000  # batches: more than anyone gives in WARM_UP_S + MEASURED_S
AUGMENT = Augment()
RESUMES = 5


class StreamFigures(NamedTuple):
    """What one start of nev's stream gave; times are from asking for the stream to its first batch, on a warm cluster."""

    images_per_s: float
    first_batch_s: float
    resume_first_s: float
    resume_last_s: float


def reader_and_plan(pictures: Pictures, size: int, window: int | None = None) -> tuple[BlockReader, Plan]:
    """The reader of a set, with text vectors, and a plan whose step is one block. window: None for the default."""
    index = build_index(pictures.shards, Columns())
    plan = Plan(index.rows, 0, BLOCK, BLOCK, choose_window(index.rows, BLOCK) if window is None else window)
    return BlockReader(index, size, Limits(), 0, AUGMENT, KEY, WIDTH), plan


def nev_stream(pictures: Pictures, size: int) -> StreamFigures:
    """nev's stream on a Ray of this machine's CPUs into one consumer."""
    import ray

    from nev.cluster.session import connect
    from nev.data.stream import make_stream

    connect()
    reader, plan = reader_and_plan(pictures, size)

    def stream(first: int, count: int) -> Generator[Any]:
        blocks = make_stream(reader, plan, first, first + count)
        yield from blocks.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2)

    def first_batch(step: int) -> float:
        begin = time.perf_counter()
        blocks = stream(step, START)
        block = next(blocks)
        seconds = time.perf_counter() - begin
        assert block["block"][0] == step
        assert sum(1 for _ in blocks) == START - 1  # to its end, so that nothing of it runs beside the next
        return seconds

    first_batch(0)  # warms the cluster: its decoding processes import what they need
    first_batch(0)
    first, last = plan.steps_per_epoch, 2 * plan.steps_per_epoch - 1
    pairs = [(first_batch(first), first_batch(last)) for _ in range(RESUMES)]
    begin = time.perf_counter()
    blocks = stream(0, MANY)
    taken = next(blocks)
    first_s = time.perf_counter() - begin
    images_per_s = rate(blocks)
    blocks.close()  # ends the stream, or its tasks would fail noisily when Ray goes
    assert taken["image"].shape == (BLOCK, size, size, 3)
    ray.shutdown()
    starts = np.median(np.array(pairs), axis=0)
    return StreamFigures(images_per_s, first_s, float(starts[0]), float(starts[1]))


def nev_rate(pictures: Pictures, size: int, window: int | None) -> float:
    """Images/s of nev's stream on a Ray of this machine's CPUs into one consumer."""
    import ray

    from nev.cluster.session import connect
    from nev.data.stream import make_stream

    connect()
    reader, plan = reader_and_plan(pictures, size, window)

    def stream() -> Generator[Any]:
        blocks = make_stream(reader, plan, 0, MANY)
        yield from blocks.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2)

    blocks = stream()
    images_per_s = rate(blocks)
    blocks.close()
    ray.shutdown()
    return images_per_s


class Counted(NamedTuple):
    """An epoch from S3. bytes_vs_data: bytes read, beside those of shards and sidecars. requests_a_group: GET and HEAD."""

    bytes_vs_data: float
    requests_a_group: float


def count_epoch(root: str, folder: str, address: str, block: int) -> Counted:
    """Read an epoch of the shards at `root` in this process.

    folder: of the same shards on the disk. address: of the object store. block: R.
    """
    from benchmarks.contestants.object_store import take_counts
    from nev.data.windows import make_windows

    index = build_index(root, Columns())
    reader = BlockReader(index, 32, Limits(), 0, AUGMENT, KEY, WIDTH)
    plan = Plan(index.rows, 0, block, block, choose_window(index.rows, block))
    windows = make_windows(plan, 0, plan.blocks_per_epoch)
    take_counts(address)
    for number in range(len(windows)):
        reader.load(windows[number].segments)
    counts = take_counts(address)
    data = sum(file.stat().st_size for file in Path(folder).rglob("*.parquet"))
    requests = counts.get("GET", 0) + counts.get("HEAD", 0)
    return Counted(counts["bytes"] / data, requests / len(index.rows))


class _Rows:
    """A torch map-style data set: encoded pictures in memory, nev's decoding."""

    def __init__(self, images: list[bytes], texts: np.ndarray, size: int) -> None:
        self.images, self.texts, self.size = images, texts, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        out = np.zeros((self.size, self.size, 3), np.uint8)
        train_view(read_header(self.images[row], Limits()), out, AUGMENT, seeded_random(0, 0, str(row), "augment"))
        return out, self.texts[row]


def dataloader(pictures: Pictures, size: int) -> float:
    """torch's DataLoader with a worker a core, the same decoding, and no file to read: the bytes are in memory."""
    from torch.utils.data import DataLoader, RandomSampler

    set_start_method("fork", force=True)  # torch's way on Linux; this process itself was spawned
    images = _encoded(pictures)
    rows = _Rows(images, np.zeros((len(images), WIDTH), np.float16), size)

    # One long epoch: an epoch's end, where its workers wait for each other, comes nowhere in the measured time.
    endless = RandomSampler(rows, num_samples=MANY * BLOCK)  # type: ignore[arg-type]
    loader = DataLoader(rows, BLOCK, sampler=endless, num_workers=os.cpu_count() or 1)  # type: ignore[arg-type]
    return rate(iter(loader))


def open_clip_stream(pictures: Pictures, size: int) -> float:
    """open_clip's WebDataset pipeline, a worker a core, its own transform and tokenizer."""
    import open_clip
    from open_clip.transform import AugmentationCfg, image_transform
    from open_clip_train.data import get_wds_dataset

    set_start_method("fork", force=True)
    transform = image_transform(size, is_train=True, aug_cfg=AugmentationCfg(scale=AUGMENT.scale))
    args = SimpleNamespace(
        train_data="::".join(pictures.tars),
        train_num_samples=MANY * BLOCK,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        workers=os.cpu_count() or 1,
        batch_size=BLOCK,
        world_size=1,
        seed=0,
    )
    data = get_wds_dataset(args, transform, is_train=True, tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    return rate(iter(data.dataloader))


def limit(pictures: Pictures, size: int) -> float:
    """The decode and resize alone, a process a core, bytes in memory, no batch handed to anyone: what the cores can do."""
    context = get_context("spawn")
    cores = os.cpu_count() or 1
    barrier, rates = context.Barrier(cores), context.Queue()
    processes = [context.Process(target=_decode_alone, args=(pictures, size, barrier, rates)) for _ in range(cores)]
    for process in processes:
        process.start()
    total: float = sum(rates.get() for _ in processes)
    for process in processes:
        process.join()
    return total


def _decode_alone(pictures: Pictures, size: int, barrier: Any, rates: Any) -> None:
    import torch

    torch.set_num_threads(1)
    images = _encoded(pictures)
    out = np.zeros((BLOCK, size, size, 3), np.uint8)

    def decode(batch: int) -> None:
        for row in range(BLOCK):
            number = (batch * BLOCK + row) % len(images)
            train_view(
                read_header(images[number], Limits()), out[row], AUGMENT, seeded_random(0, 0, str(number), "augment")
            )

    decode(0)
    barrier.wait()
    begin, done = time.perf_counter(), 0
    while (seconds := time.perf_counter() - begin) < MEASURED_S:
        decode(done)
        done += 1
    rates.put(done * BLOCK / seconds)


def rate(batches: Iterator[Any], rows: int = BLOCK) -> float:
    """Rows/s of `MEASURED_S`, after `WARM_UP_S` from the first batch on; from batch to batch, so that none counts in part.

    rows: of a batch.
    """
    next(batches)
    begin = time.perf_counter()
    while time.perf_counter() - begin < WARM_UP_S:
        next(batches)
    begin, taken = time.perf_counter(), 0
    while (seconds := time.perf_counter() - begin) < MEASURED_S:
        next(batches)
        taken += 1
    return taken * rows / seconds


def _encoded(pictures: Pictures) -> list[bytes]:
    import pyarrow.parquet as pq

    index = build_index(pictures.shards, Columns())
    files = [index.location(shard) for shard in range(len(index.paths))]
    return [image for file in files for image in pq.read_table(file, columns=["image"])["image"].to_pylist()]


def copies(pictures: Pictures, size: int) -> dict[str, float]:
    """Bytes copied a row between the file and the training tensor, counted over one window, by where.

    arrow: what Arrow allocates for the columns read (the file itself is mapped); crop: what torch copies of a crop, to lie in
    one piece; object_store: the block, as it is put there; consumer: arrays of a batch that do not lie in the store's memory.
    """
    import pyarrow as pa
    import ray
    import torch
    from torch.profiler import ProfilerActivity, profile

    from nev.cluster.session import connect
    from nev.data.stream import make_stream

    torch.set_num_threads(1)
    reader, plan = reader_and_plan(pictures, size)
    pool = pa.default_memory_pool()
    arrow, table_of = [0], reader.read_rows

    def counted(*args: Any) -> pa.Table:
        before = pool.bytes_allocated()
        table = table_of(*args)
        arrow[0] += pool.bytes_allocated() - before
        return table

    object.__setattr__(reader, "read_rows", counted)
    window = plan.make_window(0, plan.window_bounds(0)[1])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for _ in reader.read_blocks(window):
            pass
    object.__delattr__(reader, "read_rows")
    crop = sum(event.cpu_memory_usage for event in profiled.events() if event.name == "aten::clone")
    connect()
    stream = make_stream(reader, plan, 0, 1).materialize()
    (block,) = [reference for bundle in stream.iter_internal_ref_bundles() for reference in bundle.block_refs]
    stored = ray.get(block).nbytes
    batch = next(iter(stream.iter_batches(batch_size=None, batch_format="numpy")))
    tensors = {name: torch.from_numpy(batch[name]) for name in ("image", "text", "valid")}
    assert all(tensor.data_ptr() == batch[name].ctypes.data for name, tensor in tensors.items())
    consumer = sum(array.nbytes for array in batch.values() if array.base is None and array.dtype != object)
    ray.shutdown()
    rows = len(window.order)
    found = {
        "arrow": (arrow[0], rows),
        "crop": (crop, rows),
        "object_store": (stored, BLOCK),
        "consumer": (consumer, BLOCK),
    }
    return {name: nbytes / count for name, (nbytes, count) in found.items()}


def tar_mb_per_s(pictures: Pictures) -> tuple[float, float]:
    """MB/s of a plain read of the tars, and of `index_tars`, in this process; the pages of the files are not in memory before."""
    from nev.data.prepare.in_place import index_tars
    from nev.data.sources import SourceOptions, find_files

    size = sum(Path(tar).stat().st_size for tar in pictures.tars)
    _forget_pages(pictures.tars)
    begin = time.perf_counter()
    for tar in pictures.tars:
        with open(tar, "rb") as file:
            while file.read(2**20):
                pass
    read_s = time.perf_counter() - begin
    _forget_pages(pictures.tars)
    with tempfile.TemporaryDirectory() as output:
        begin = time.perf_counter()
        index_tars(find_files(pictures.tars, (".tar",)), f"{output}/index", SourceOptions())
        return size / 1e6 / read_s, size / 1e6 / (time.perf_counter() - begin)


def _forget_pages(files: list[str]) -> None:
    for name in files:
        handle = os.open(name, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)

"""The sets that the data benchmark reads, made once in a temporary folder: shards with sidecars, and tars of the same rows."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.contestants.processes import BenchmarkFailed
from nev.config.data import Columns
from nev.data.index import build_index
from nev.data.prepare.in_place import index_tars
from nev.data.prepare.pipeline import prepare
from nev.data.prepare.shards import Layout, infer_schema, write_shard
from nev.data.rows import Row
from nev.data.sources import SOURCES, SourceOptions, find_files, iterate_rows, make_source
from nev.data.text_sidecar import sidecar_key, write_sidecar

WIDTH = 384  # of the text vectors, as MiniLM's
KEY = sidecar_key("benchmark", "caption")
BLOCK = 256  # rows of a block and of a row group
TARS = 4
SHARD_ROWS = 10_000  # of `write_groups`, as many tools write them


class Pictures(NamedTuple):
    """One set: a folder of shards with sidecars, and tars in WebDataset's layout with the same rows.

    in_place: folder of the index of the tars, with sidecars.
    """

    name: str
    shards: str
    tars: list[str]
    rows: int
    in_place: str


def imagenet_sample(data: Path, folder: Path, rows: int) -> Pictures:
    """The photographs of `imagenet_sample`, each as often as it takes to have `rows` rows."""
    paths = sorted((data / "imagenet_sample").glob("*.JPEG"))
    if not paths:
        raise BenchmarkFailed(f"{data}/imagenet_sample: no .JPEG file. Set NEV_DATA to the folder of the real data.")
    files = [path.read_bytes() for path in paths]
    captions = [path.stem.partition("_")[2].replace("_", " ") for path in paths]
    found: Iterator[Row] = (
        {"uid": f"{row:06d}", "image": files[row % len(files)], "caption": captions[row % len(files)]}
        for row in range(rows)
    )
    return _written("imagenet_sample", found, folder)


def flickr8k(data: Path, folder: Path, rows: int) -> Pictures:
    """The first `rows` training rows of Flickr8k, 224x224."""
    read = iterate_rows(SOURCES["webdataset"]([data / "flickr8k/train"], SourceOptions()))
    found = (row for _, row in zip(range(rows), read, strict=False))
    return _written("flickr8k", found, folder)


def write_groups(data: Path, folder: Path, rows: int, group_rows: int) -> None:
    """Shards of 10,000 rows of Flickr8k, each row as often as it takes, in row groups of `group_rows`, with sidecars."""
    read = list(iterate_rows(SOURCES["webdataset"]([data / "flickr8k/train"], SourceOptions())))
    schema = infer_schema((), several=True)
    folder.mkdir(parents=True)
    for shard in range(rows // SHARD_ROWS):
        numbers = range(shard * SHARD_ROWS, (shard + 1) * SHARD_ROWS)
        kept: list[Row] = [{**read[number % len(read)], "uid": f"{number:06d}"} for number in numbers]
        groups = [kept[start : start + group_rows] for start in range(0, SHARD_ROWS, group_rows)]
        write_shard(folder / f"{shard:05d}.parquet", groups, schema)
    _write_sidecars(str(folder))


def _written(name: str, rows: Iterator[Row], folder: Path) -> Pictures:
    kept = list(rows)
    shards = folder / name / "shards"
    prepare(make_source(kept), shards, seed=0, layout=Layout(rows_per_shard=4 * BLOCK, row_group_rows=BLOCK))
    _write_sidecars(str(shards))
    tars = []
    for number in range(TARS):
        tars.append(str(folder / name / f"{number:05d}.tar"))
        with tarfile.open(tars[-1], "w") as tar:
            for row in kept[number::TARS]:
                caption = row["caption"] if isinstance(row["caption"], str) else (row["caption"] or [""])[0]
                for extension, content in (("jpg", row["image"] or b""), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{row['uid'].replace('.', '_')}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    in_place = f"{folder}/{name}/index"
    index_tars(find_files(tars, (".tar",)), in_place, SourceOptions(), row_group_rows=BLOCK)
    _write_sidecars(in_place)
    return Pictures(name, str(shards), tars, len(kept), in_place)


def _write_sidecars(folder: str) -> None:
    index = build_index(folder, Columns())
    for shard in range(len(index.paths)):
        write_sidecar(index, shard, KEY, WIDTH, _vectors)


def _vectors(captions: Sequence[str]) -> NDArray[np.float32]:
    seeds = [int.from_bytes(hashlib.blake2b(one.encode(), digest_size=8).digest(), "big") for one in captions]
    return np.stack([np.random.default_rng(seed).standard_normal(WIDTH, np.float32) for seed in seeds])

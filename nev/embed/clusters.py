"""Vectors of a pool in clusters of neighbours: k-means on a sample, and a file on this machine in the order of the clusters.

Memory: 5 bytes a row, the sample, and one vector file. Disk: the vectors once.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nev.config.base import ConfigError
from nev.data.vectors import VectorSpec, as_array, read_vectors
from nev.ops.vectors import Floats, restore

EXACT_ROWS = 16_384  # so many rows, or fewer, are one cluster
SAMPLE_A_CLUSTER = 40  # rows of the sample for each cluster
ASSIGN_ROWS = 8192


class Pool(NamedTuple):
    """Rows of vector files.

    files: paths or URLs.
    starts: int64 [files + 1], the row number at which each file starts, and that of the end.
    chosen: bool [rows], the rows that take part.
    spec: of all files.
    """

    files: list[str]
    starts: NDArray[np.int64]
    chosen: NDArray[np.bool_]
    spec: VectorSpec

    def iterate(self) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
        """The chosen rows of each file: their numbers, and their vectors as they are stored, [n, k]."""
        for number, file in enumerate(self.files):
            start, stop = self.starts[number : number + 2]
            rows = np.flatnonzero(self.chosen[start:stop])
            if len(rows):
                yield start + rows, as_array(read_vectors(file, ["vector"])["vector"])[rows]

    def restore(self, stored: NDArray[Any]) -> Floats:
        """Unit vectors, float32 [n, width], of vectors as they are stored."""
        return restore(stored, self.spec.precision, self.spec.width)


class Clusters(NamedTuple):
    """The chosen rows of a pool in the order of their clusters.

    bounds: int64 [clusters + 1], where each cluster starts, and the end.
    rows: int64 [n], the number of each row in the pool; ascending within a cluster.
    vectors: [n, k], as they are stored.
    """

    bounds: NDArray[np.int64]
    rows: NDArray[np.int64]
    vectors: NDArray[Any]


def count_clusters(rows: int) -> int:
    """Clusters with which rows are compared with centroids about as often as with each other."""
    return 1 if rows <= EXACT_ROWS else round((rows / 2) ** 0.5)


@contextmanager
def make_clusters(pool: Pool, count: int, seed: int = 0) -> Iterator[Clusters]:
    """Divide the chosen rows of a pool into clusters, on the disk of TMPDIR, for the body of a `with`.

    Raises ConfigError where that disk has no room.
    """
    labels = np.zeros(int(pool.chosen.sum()), np.int32) if count == 1 else assign_labels(pool, count, seed)
    bounds = np.concatenate([[0], np.cumsum(np.bincount(labels, minlength=count))])
    with tempfile.TemporaryDirectory(prefix="nev-clusters-") as folder:
        stored = pool.spec.vector_type
        numbers = stored.value_type.to_pandas_dtype()
        needed = len(labels) * (8 + stored.list_size * np.dtype(numbers).itemsize)
        if needed > (free := shutil.disk_usage(folder).free):
            raise ConfigError(
                f"{folder}: the vectors take {needed / 2**30:,.1f} GiB here, and the disk has {free / 2**30:,.1f} GiB free. Set "
                "TMPDIR to a larger disk."
            )
        shape = (max(1, len(labels)), stored.list_size)
        vectors = np.memmap(Path(folder, "vectors"), numbers, "w+", shape=shape)
        rows = np.memmap(Path(folder, "rows"), np.int64, "w+", shape=shape[:1])
        fill, start = bounds[:-1].copy(), 0
        for numbers_of_rows, some in pool.iterate():
            mine = labels[start : start + len(some)]
            order = np.argsort(mine, kind="stable")
            sizes = np.bincount(mine, minlength=count)
            places = np.repeat(fill - (np.cumsum(sizes) - sizes), sizes) + np.arange(len(mine))
            vectors[places], rows[places] = some[order], numbers_of_rows[order]
            fill += sizes
            start += len(some)
        yield Clusters(bounds, rows[: len(labels)], vectors[: len(labels)])


def assign_labels(pool: Pool, count: int, seed: int) -> NDArray[np.int32]:
    """The cluster of each chosen row: int32 [n], by MiniBatchKMeans (Sculley 2010) on a random sample."""
    from sklearn.cluster import MiniBatchKMeans

    sample = draw_sample(pool, SAMPLE_A_CLUSTER * count, seed)
    kmeans = MiniBatchKMeans(count, batch_size=max(1024, 2 * count), n_init=1, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)  # fewer distinct points than clusters
        kmeans.fit(sample)
    labels = [
        kmeans.predict(pool.restore(some[start : start + ASSIGN_ROWS]))
        for _, some in pool.iterate()
        for start in range(0, len(some), ASSIGN_ROWS)
    ]
    return np.concatenate(labels).astype(np.int32)


def draw_sample(pool: Pool, size: int, seed: int) -> Floats:
    """About `size` of the chosen rows, at random: float32 [m, width]."""
    share = min(1.0, size / max(1, int(pool.chosen.sum())))
    rng = np.random.default_rng(seed)
    return np.concatenate([pool.restore(some[rng.random(len(some)) < share]) for _, some in pool.iterate()])

"""The second stage of `prepare`, on the driver: which rows are written, and to which shard.

The driver holds the digest and the position of every row: at most 58 bytes a row, 122 with `unique`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nev.data import labels
from nev.data.labels import ClassNames, Names
from nev.data.prepare.job_state import Record
from nev.data.prepare.scatter import PartKeys, assign_bucket
from nev.data.uids import KEY, Keys

DUPLICATE_UID = "duplicate uid"


class Order(NamedTuple):
    """The rows of a set, in the order of their digests.

    digests: bytes, digests of the rows that are written.
    left_out: int64, positions in the input of the rows that are not written.
    left_out_digests: bytes, digests of these rows.
    offsets: int64 [runs, buckets + 1], of all runs.
    dropped: number of rows that are not written, by reason.
    """

    digests: Keys
    left_out: NDArray[np.int64]
    left_out_digests: Keys
    offsets: NDArray[np.int64]
    dropped: dict[str, int]


class Shard(NamedTuple):
    """The rows of a shard: those with digests from `low` to `high`, but for the rows that are left out.

    number: of the shard.
    rows: how many.
    ranges: int64 [runs, 2], the range of bytes of each run that holds these rows. It also holds rows of the neighbouring shards.
    left_out: int64, positions in the input of the rows that are left out.
    """

    number: int
    rows: int
    low: bytes
    high: bytes
    ranges: NDArray[np.int64]
    left_out: NDArray[np.int64]


def compute_order(parts: Sequence[PartKeys]) -> Order:
    """Sort the rows by digest. Of rows with the same uid, then with the same image hash, only the first in the input stays."""
    digests = np.concatenate([part.digests for part in parts])
    images = np.concatenate([part.images for part in parts])
    stays = np.ones(len(digests), bool)
    order = np.argsort(digests, kind="stable")
    digests = digests[order]
    repeated = order[1:][_equals_previous(digests)]
    stays[repeated] = False
    dropped = {DUPLICATE_UID: len(repeated)}
    if len(images):
        rest = np.flatnonzero(stays)
        hashes = images[rest]
        by_image = np.argsort(hashes, kind="stable")
        repeated = rest[by_image[1:][_equals_previous(hashes[by_image])]]
        stays[repeated] = False
        dropped["duplicate image"] = len(repeated)
    stays = stays[order]
    offsets = np.concatenate([part.offsets for part in parts])
    reasons = {reason: count for reason, count in dropped.items() if count}
    return Order(digests[stays], order[~stays], digests[~stays], offsets, reasons)


def _equals_previous(keys: Keys) -> NDArray[np.bool_]:
    """For each of the sorted `keys` but the first, whether it equals the key before it."""
    return np.asarray(keys[1:] == keys[:-1])


def find_shard(order: Order, number: int, rows_per_shard: int) -> Shard:
    """The rows of shard `number`: `rows_per_shard` rows, fewer in the last shard."""
    digests = order.digests[number * rows_per_shard : (number + 1) * rows_per_shard]
    low, high = (bytes(digest).ljust(KEY.itemsize, b"\0") for digest in (digests[0], digests[-1]))  # NumPy strips zeros
    first, end = (
        np.searchsorted(order.left_out_digests, low),
        np.searchsorted(order.left_out_digests, high, side="right"),
    )
    buckets = order.offsets.shape[1] - 1
    ranges = order.offsets[:, [assign_bucket(low, buckets), assign_bucket(high, buckets) + 1]]
    return Shard(number, len(digests), low, high, ranges, order.left_out[first:end])


def merge_keys(parts: Sequence[Record], known: ClassNames | None) -> Record:
    """Merge the records of all parts into the start of `plan.json`. Raises ConfigError where a label has two names."""
    dropped: Counter[str] = Counter()
    names: Names = {}
    highest = max(part["highest"] for part in parts)
    for part in parts:
        dropped.update(part["dropped"])
        for label, name, uid in part["names"]:
            labels.add_name(names, label, name, uid, known)
    return {
        "rows_in": sum(part["rows_in"] for part in parts),
        "dropped": dict(dropped),
        "seen": sorted({name for part in parts for name in part["seen"]}),
        "named": [[label, name, uid] for label, (name, uid) in sorted(names.items())],
        "names": [name for _, (name, _) in sorted(names.items())] if labels.is_complete(names, highest) else [],
        "labelled": highest >= 0,
    }

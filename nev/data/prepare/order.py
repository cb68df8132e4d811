"""The second stage of `prepare`, on the driver: which rows stay, and which of them each shard gets.

Of every row it holds the digest and its place: at most 58 bytes a row, 122 where equal images are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nev.data import labels
from nev.data.labels import ClassNames, Names
from nev.data.prepare.job_state import Facts
from nev.data.prepare.scatter import PartKeys, assign_bucket
from nev.data.uids import KEY, Keys

DUPLICATE_UID = "duplicate uid"


class Order(NamedTuple):
    """The rows of a set, in the order of their digests.

    kept: digests of those that stay, bytes. left_out: int64 places in the input of the others, and left_digests, bytes.
    offsets: int64 [runs, buckets + 1] of all runs.
    """

    digests: Keys
    left_out: NDArray[np.int64]
    left_out_digests: Keys
    offsets: NDArray[np.int64]
    dropped: dict[str, int]


class Shard(NamedTuple):
    """What a shard gets: the rows with digests from `low` to `high`, save those at the places `left_out` in the input.

    ranges: int64 [runs, 2], the bytes of each run that hold these rows, and at both ends some that belong to neighbours.
    """

    number: int
    rows: int
    low: bytes
    high: bytes
    ranges: NDArray[np.int64]
    left_out: NDArray[np.int64]


def compute_order(parts: Sequence[PartKeys]) -> Order:
    """Put the rows in order. Of equal uids the first in the input stays, then of equal images, where hashes are given."""
    digests = np.concatenate([part.digests for part in parts])
    images = np.concatenate([part.images for part in parts])
    stays = np.ones(len(digests), bool)
    order = np.argsort(digests, kind="stable")
    digests = digests[order]
    again = order[1:][_equal_before(digests)]
    stays[again] = False
    dropped = {DUPLICATE_UID: len(again)}
    if len(images):
        rest = np.flatnonzero(stays)
        known = images[rest]
        by_image = np.argsort(known, kind="stable")
        again = rest[by_image[1:][_equal_before(known[by_image])]]
        stays[again] = False
        dropped["duplicate image"] = len(again)
    stays = stays[order]
    offsets = np.concatenate([part.offsets for part in parts])
    found = {reason: count for reason, count in dropped.items() if count}
    return Order(digests[stays], order[~stays], digests[~stays], offsets, found)


def _equal_before(keys: Keys) -> NDArray[np.bool_]:
    """Of sorted keys, save the first: whether it equals the one before it."""
    return np.asarray(keys[1:] == keys[:-1])


def find_shard(order: Order, number: int, rows_per_shard: int) -> Shard:
    """What shard `number` gets: `rows_per_shard` rows, the last one of a set the rest."""
    own = order.digests[number * rows_per_shard : (number + 1) * rows_per_shard]
    low, high = (bytes(digest).ljust(KEY.itemsize, b"\0") for digest in (own[0], own[-1]))  # NumPy strips zeros
    first, end = np.searchsorted(order.left_out_digests, low), np.searchsorted(order.left_out_digests, high, side="right")
    buckets = order.offsets.shape[1] - 1
    ranges = order.offsets[:, [assign_bucket(low, buckets), assign_bucket(high, buckets) + 1]]
    return Shard(number, len(own), low, high, ranges, order.left_out[first:end])


def merge_keys(parts: Sequence[Facts], known: ClassNames | None) -> Facts:
    """What all parts together say. Raises ConfigError where they call a label by two names."""
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

"""Two sequences of rows in shares: one sequence, of whole row groups.

The sequences are merged by virtual time: a run of rows whose middle is row m of its sequence comes at m / share. At any place of
the merged sequence each of the two is then within half of a row group of its share. More than two are merged one after another,
the smallest shares first. As the time of a run depends on nothing else, any place is found without a replay of what is before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nev.data.set_order import Runs, SetOrder


@dataclass(frozen=True)
class MergedOrder:
    """The sequence of two sequences.

    orders: the two.
    shares: of each, whole numbers.
    """

    orders: tuple[SetOrder | MergedOrder, SetOrder | MergedOrder]
    shares: tuple[int, int]

    @property
    def largest_run(self) -> int:
        """The most rows of a run."""
        return max(order.largest_run for order in self.orders)

    def runs_between(self, first: int, last: int) -> Runs:
        """The runs that begin at `first` of the sequence or behind, and before `last`."""
        total, around = sum(self.shares), 2 * sum(order.largest_run for order in self.orders)
        # At virtual time t the sequence is at row t * total, but for the row groups that are cut there.
        time = (first - around) / total
        parts, begin = [], 0
        for order, share in zip(self.orders, self.shares, strict=True):
            start = max(0, (first - around) * share // total - order.largest_run)
            runs = order.runs_between(start, (last + around) * share // total + 2 * order.largest_run)
            times = _times(runs, share)
            skipped = int(np.searchsorted(times, time))
            begin += int(runs.begin[skipped])
            parts.append((times[skipped:], Runs(*(column[skipped:] for column in runs))))
        order_of_runs = np.argsort(np.concatenate([times for times, _ in parts]), kind="stable")
        columns = zip(*(runs for _, runs in parts), strict=True)
        merged = Runs(*(np.concatenate(column)[order_of_runs] for column in columns))
        ends = begin + np.cumsum(merged.rows)
        begins = ends - merged.rows
        chosen = slice(*np.searchsorted(begins, [first, last]).tolist())
        return Runs(*(column[chosen] for column in merged._replace(begin=begins)))


def _times(runs: Runs, share: int) -> NDArray[np.float64]:
    """The virtual time of each run's middle: float64 [n]. One division of exact numbers: the same wherever it is computed."""
    return (runs.begin + runs.rows / 2) / share


def merge_orders(orders: Sequence[SetOrder], shares: Sequence[int]) -> SetOrder | MergedOrder:
    """The sequence of all sequences, in shares."""
    smallest_first = sorted(zip(shares, orders, strict=True), key=lambda pair: (pair[0], pair[1].number))
    total, merged = smallest_first[0]
    result: SetOrder | MergedOrder = merged
    for share, order in smallest_first[1:]:
        result = MergedOrder((order, result), (share, total))
        total += share
    return result

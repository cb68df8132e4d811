"""A rank that hangs is named as the cause where a collective has timed out, and nowhere else."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.gloo import on_ranks

from nev.runs.manifest import Unreadable
from nev.storage.files import StorageError
from nev.train.worker.process import is_collective_timeout

LIMIT = timedelta(seconds=1)


def _waits(rank: int) -> list[bool]:
    """Rank 0 waits for rank 1, which comes after the limit, by an all-reduce and by a gather of objects."""
    found = []
    for kind in ("reduce", "objects"):
        group = dist.new_group(timeout=LIMIT)
        if rank == 1:
            continue
        try:
            if kind == "reduce":
                dist.all_reduce(torch.ones(3), group=group)
            else:
                dist.all_gather_object([None, None], "a", group=group)
        except RuntimeError as error:
            found.append(is_collective_timeout(error))
    if rank == 1:
        time.sleep(4)
    return found


@pytest.mark.slow
def test_a_collective_that_timed_out(tmp_path: Path) -> None:
    assert on_ranks(_waits, 2, tmp_path) == [[True, True], []]


@pytest.mark.parametrize(
    "error",
    [
        StorageError("s3://bucket/a cannot be written (Connect timed out)"),
        Unreadable("s3://bucket/a/state.json: cannot be read (Read timed out. (read timeout=60))"),
        RuntimeError("the decoder timed out"),
        RuntimeError("[/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:20669"),
    ],
)
def test_another_error_with_such_words(error: RuntimeError) -> None:
    assert not is_collective_timeout(error)


def test_the_store_and_nccl_raise_errors_of_their_own() -> None:
    assert is_collective_timeout(
        dist.DistStoreError("Timed out after 2 seconds waiting for clients. 1/2 clients joined.")
    )
    assert is_collective_timeout(
        dist.DistBackendError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1)")
    )
    assert not is_collective_timeout(dist.DistBackendError("NCCL error: unhandled system error"))

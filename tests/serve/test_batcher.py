"""Dynamic batching: what is merged, whose results are whose, who waits, and what a failure touches."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nev.serve import batcher as batching
from nev.serve.batcher import Batcher, ItemFailed
from nev.serve.errors import ApiError
from nev.serve.metrics import Meters, make_meters


class Doubler:
    """A forward over integers that records its batches, and waits where `gate` is closed."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        assert self.gate.wait(10)
        if -1 in items:
            raise ValueError("minus one")
        return [2 * item for item in items]


def run(
    test: Callable[[Batcher[int, int], Doubler, Meters], Coroutine[Any, Any, None]], max_batch: int = 8, most: int = 100
) -> None:
    """Run a test with a batcher in an event loop."""

    async def main() -> None:
        forward, meters = Doubler(), make_meters()
        queue: Batcher[int, int] = Batcher("number", forward, max_batch, most, meters)
        queue.start()
        try:
            await test(queue, forward, meters)
        finally:
            forward.gate.set()
            await queue.stop()

    asyncio.run(main())


async def close_and_wait(queue: Batcher[int, int], forward: Doubler) -> asyncio.Task[list[int]]:
    """Start a forward of one item that does not end before the gate opens."""
    forward.gate.clear()
    first = asyncio.ensure_future(queue.encode([0]))
    while not forward.batches:
        await asyncio.sleep(0.001)
    return first


def test_what_waits_during_a_forward_is_one_forward() -> None:
    async def test(queue: Batcher[int, int], forward: Doubler, meters: Meters) -> None:
        first = await close_and_wait(queue, forward)
        others = [asyncio.ensure_future(queue.encode([n])) for n in range(1, 8)]
        await asyncio.sleep(0.01)
        forward.gate.set()
        assert await first == [0]
        assert [await other for other in others] == [[2 * n] for n in range(1, 8)]
        assert forward.batches == [[0], [*range(1, 8)]]

    run(test)


def test_callers_that_come_back_run_together() -> None:
    """After a forward of eight the first of them does not run alone, and the other seven behind it."""

    async def test(queue: Batcher[int, int], forward: Doubler, meters: Meters) -> None:
        def slow(items: list[int]) -> list[int]:
            threading.Event().wait(0.1)
            return forward(items)

        queue._run = slow

        async def call(n: int) -> None:
            for _ in range(6):
                await queue.encode([n])
                await asyncio.sleep(0.0005 * n)  # each takes another time to come back

        await asyncio.gather(*map(call, range(8)))
        assert 6 <= len(forward.batches) <= 8  # without the pause 11

    run(test)


def test_a_single_caller_never_waits() -> None:
    async def test(queue: Batcher[int, int], forward: Doubler, meters: Meters) -> None:
        paused = []
        queue._pause = lambda: record(paused, queue._count_queued())
        for n in range(5):
            await queue.encode([n])
        assert paused == [1] * 5

    async def record(paused: list[int], count: int) -> None:
        paused.append(count)

    run(test)


def test_a_large_request_does_not_keep_a_small_one_waiting() -> None:
    async def test(queue: Batcher[int, int], forward: Doubler, meters: Meters) -> None:
        first = await close_and_wait(queue, forward)
        large = asyncio.ensure_future(queue.encode(list(range(100, 164))))
        small = asyncio.ensure_future(queue.encode([7]))
        await asyncio.sleep(0.01)
        forward.gate.set()
        await asyncio.gather(first, large, small)
        assert 7 in forward.batches[1]
        assert large.result() == [2 * n for n in range(100, 164)]
        assert all(len(batch) <= 8 for batch in forward.batches)

    run(test)


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(0, 10**6), max_size=20), max_size=12), st.integers(1, 9))
def test_results_are_never_swapped(requests: list[list[int]], max_batch: int) -> None:
    async def test(queue: Batcher[int, int], forward: Doubler, meters: Meters) -> None:
        found = await asyncio.gather(*(queue.encode(items) for items in requests))
        assert found == [[2 * item for item in items] for items in requests]
        assert sum(map(len, forward.batches)) == sum(map(len, requests))

    run(test, max_batch)


def test_an_item_that_breaks_a_forward_fails_for_its_caller_alone() -> None:
    async def test(queue: Batcher[int, int], forward: Doubler, meters: Meters) -> None:
        first = await close_and_wait(queue, forward)
        calls = [asyncio.ensure_future(queue.encode(items)) for items in ([1], [2, -1, 3], [4])]
        await asyncio.sleep(0.01)
        forward.gate.set()
        found = await asyncio.gather(first, *calls, return_exceptions=True)
        assert found[0] == [0]
        assert found[1] == [2]
        assert found[3] == [8]
        assert isinstance(found[2], ItemFailed)
        assert found[2].number == 1
        assert await queue.encode([5]) == [10]
        assert meters.failed.labels("number")._value.get() == 1

    run(test)


def test_a_caller_who_has_gone_costs_no_forward() -> None:
    async def test(queue: Batcher[int, int], forward: Doubler, meters: Meters) -> None:
        first = await close_and_wait(queue, forward)
        gone, stays = asyncio.ensure_future(queue.encode([1, 2, 3])), asyncio.ensure_future(queue.encode([4]))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(0)
        forward.gate.set()
        await asyncio.gather(first, stays)
        assert forward.batches == [[0], [4]]
        assert meters.dropped.labels("number")._value.get() == 3

    run(test)


def test_too_many_waiting_are_refused_with_the_time_to_come_again() -> None:
    async def test(queue: Batcher[int, int], forward: Doubler, meters: Meters) -> None:
        queue.waiting.note_seconds(0.4)
        with queue.waiting.admit(10):
            with pytest.raises(ApiError, match="try again") as caught, queue.waiting.admit(1):
                pytest.fail("ten wait already")
            assert caught.value.status_code == 429
            assert caught.value.headers == {"Retry-After": "4"}
        with queue.waiting.admit(1):
            assert meters.waiting.labels("number")._value.get() == 1
        assert meters.waiting.labels("number")._value.get() == 0
        assert meters.rejected.labels("queue")._value.get() == 1

    run(test, most=10)


def test_a_queue_that_has_ended_answers_everybody() -> None:
    async def test(queue: Batcher[int, int], forward: Doubler, meters: Meters) -> None:
        queue._note_forward = None  # type: ignore[assignment,method-assign]
        calls = [asyncio.ensure_future(queue.encode([n])) for n in range(20)]
        found = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10)
        assert {error.status_code for error in found if isinstance(error, ApiError)} == {503}
        assert len(found) == 20
        for call in (queue.encode([1]), queue.probe(1)):
            with pytest.raises(ApiError, match="not answered"):
                await call

    run(test)


def test_health_is_the_last_success_or_a_forward_now(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(queue: Batcher[int, int], forward: Doubler, meters: Meters) -> None:
        await queue.probe(7)
        await queue.probe(7)
        assert forward.batches == [[7]]
        monkeypatch.setattr(batching, "FRESH_SECONDS", 0)
        await queue.probe(7)
        assert forward.batches == [[7], [7]]
        with pytest.raises(ApiError, match="minus one") as caught:
            await queue.probe(-1)
        assert caught.value.status_code == 503

    run(test)


def test_after_a_failure_health_asks_the_model() -> None:
    async def test(queue: Batcher[int, int], forward: Doubler, meters: Meters) -> None:
        await queue.encode([1])
        with pytest.raises(ItemFailed):
            await queue.encode([-1])
        with pytest.raises(ApiError, match="minus one"):
            await queue.probe(-1)
        await queue.probe(7)
        await queue.probe(-1)  # the last success is proof enough again
        assert forward.batches == [[1], [-1], [-1], [7]]

    run(test)


def test_a_forward_that_hangs_is_no_health(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(queue: Batcher[int, int], forward: Doubler, meters: Meters) -> None:
        monkeypatch.setattr(batching, "HUNG_SECONDS", 0.05)
        first = await close_and_wait(queue, forward)
        with pytest.raises(ApiError, match="hangs"):
            await queue.probe(7)
        forward.gate.set()
        await first

    run(test)

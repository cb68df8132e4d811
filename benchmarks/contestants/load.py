"""Load on a server: callers that ask again as soon as they have an answer, and callers that come at a fixed rate."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import time
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import psutil

WORDS = (
    "red dog",
    "blue cat",
    "old house",
    "tall tree",
    "small child",
    "green grass",
    "in the snow",
    "on a ball",
    "by the water",
)
TEXTS, PICTURES = 500, 32
PHOTO = (500, 375)  # pixels, of Flickr's photographs


class Load(NamedTuple):
    """What a server did. latencies: seconds of a request, sorted. cpu_ms: of the server's processes, a request."""

    per_s: float
    latencies: list[float]
    statuses: dict[str, int]
    cpu_ms: float

    def percentile(self, share: float) -> float:
        """Milliseconds within which a share of the requests was answered."""
        return 1000 * float(np.quantile(self.latencies, share)) if self.latencies else float("nan")

    @property
    def errors(self) -> int:
        """Answers that are neither 200 nor 429, and connections that broke."""
        return sum(count for status, count in self.statuses.items() if status not in ("200", "429"))


def make_bodies(kind: str) -> list[bytes]:
    """Requests of one item each. kind: `text`, 4 to 18 words; `image`, JPEGs of photographs' size; `none`, nothing to embed."""
    if kind == "none":
        return [b""]
    if kind == "text":
        choose = random.Random(0)
        texts = [" ".join(choose.choices(WORDS, k=choose.randint(2, 6))) for _ in range(TEXTS)]
        return [json.dumps({"input": text, "encoding_format": "base64"}).encode() for text in texts]
    from io import BytesIO

    from PIL import Image

    bodies = []
    for coarse in np.random.default_rng(0).integers(0, 256, (PICTURES, 24, 32, 3), dtype=np.uint8):
        file = BytesIO()
        Image.fromarray(coarse).resize(PHOTO, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        bodies.append(json.dumps({"input": [{"image": url}], "encoding_format": "base64"}).encode())
    return bodies


def measure(url: str, pid: int, kind: str, callers: int, seconds: float, core: int) -> Load:
    """Ask for `seconds`, as many at once as there are `callers`, from one core. pid: of the server, with its children."""
    os.sched_setaffinity(0, {core})
    return asyncio.run(_ask_closely(url, pid, make_bodies(kind), callers, seconds))


async def _ask_closely(url: str, pid: int, bodies: list[bytes], callers: int, seconds: float) -> Load:
    import aiohttp

    latencies: list[float] = []
    statuses: Counter[str] = Counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(number: int, end: float, count: bool) -> None:
            while (start := time.perf_counter()) < end:
                status = await _ask(session, url, bodies[number % len(bodies)])
                if count:
                    latencies.append(time.perf_counter() - start)
                    statuses[status] += 1
                number += callers

        async def run(duration: float, count: bool) -> None:
            end = time.perf_counter() + duration
            await asyncio.gather(*(ask(number, end, count) for number in range(callers)))

        await run(seconds / 5, count=False)
        cpu, start = cpu_seconds(pid), time.perf_counter()
        await run(seconds, count=True)
        wall, used = time.perf_counter() - start, cpu_seconds(pid) - cpu
    return Load(len(latencies) / wall, sorted(latencies), dict(statuses), 1000 * used / max(1, len(latencies)))


async def _ask(session: Any, url: str, body: bytes) -> str:
    import aiohttp

    try:
        if not body:
            async with session.get(f"{url}/v1/models") as answer:
                await answer.read()
        else:
            head = {"Content-Type": "application/json"}
            async with session.post(f"{url}/v1/embeddings", data=body, headers=head) as answer:
                await answer.read()
        return str(answer.status)
    except (aiohttp.ClientError, OSError) as error:
        return type(error).__name__


class Overload(NamedTuple):
    """A server that was asked for more than it can. memory_mib: resident, after a tenth of the time, and at the end."""

    statuses: dict[str, int]
    memory_mib: tuple[float, float]


def overload(url: str, pid: int, rate: float, seconds: float, core: int) -> Overload:
    """Ask for texts at a fixed rate, whether or not answers come."""
    os.sched_setaffinity(0, {core})
    return asyncio.run(_ask_at_rate(url, pid, make_bodies("text"), rate, seconds))


async def _ask_at_rate(url: str, pid: int, bodies: list[bytes], rate: float, seconds: float) -> Overload:
    import aiohttp

    statuses: Counter[str] = Counter()
    memory: list[float] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(number: int) -> None:
            statuses[await _ask(session, url, bodies[number % len(bodies)])] += 1

        start, number, tasks = time.perf_counter(), 0, set[asyncio.Task[None]]()
        while (passed := time.perf_counter() - start) < seconds:
            while number < passed * rate:
                task = asyncio.create_task(ask(number))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                number += 1
            if not memory and passed > seconds / 10:
                memory.append(memory_mib(pid))
            await asyncio.sleep(0.005)
        memory.append(memory_mib(pid))
        await asyncio.gather(*tasks)
    return Overload(dict(statuses), (memory[0], memory[-1]))


def _family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and all below it so far."""
    total = 0.0
    for process in _family(pid):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def memory_mib(pid: int) -> float:
    """Resident memory of a process, in MiB."""
    return float(psutil.Process(pid).memory_info().rss) / 2**20

"""The count of what is read from S3, and its way into Ray's metrics."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from nev.cluster.metrics import Exported
from nev.data import stream
from nev.data.plan import Plan
from nev.data.windows import make_windows
from nev.storage.files import filesystem, local_copy, write_atomic
from nev.storage.traffic import count_read, take_read_bytes

if TYPE_CHECKING:
    from helpers.s3_server import Proxy


def test_bytes_of_answers_are_counted_once(s3: Proxy, tmp_path: Path) -> None:
    fs, path = filesystem("s3://bucket/file")
    write_atomic("s3://bucket/file", b"x" * 1000)
    take_read_bytes()
    fs.cat_file(path)
    with fs.open(path, "rb", cache_type="none", size=1000) as file:
        file.seek(100)
        file.read(200)
    assert take_read_bytes() == 1200
    with local_copy("s3://bucket/file"):
        pass
    assert take_read_bytes() == 1000
    write_atomic(str(tmp_path / "file"), b"x" * 1000)
    (tmp_path / "file").read_bytes()
    assert take_read_bytes() == 0


def test_a_decoding_task_exports_what_its_block_has_read(monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[tuple[str, float, str]] = []

    class Recorded:
        def __init__(self, tags: dict[str, str]) -> None:
            self.run = tags["run"]

        def add(self, metric: Exported, value: float) -> None:
            added.append((metric.name, value, self.run))

    def read_blocks(*_: Any) -> Any:
        count_read(500)  # a window is read once, for both of its blocks
        for _ in range(2):
            yield {"valid": np.ones(2, np.bool_)}

    reader = SimpleNamespace(read_blocks=read_blocks, allocate=lambda rows: None)
    windows = make_windows(Plan(np.full(2, 2), 0, 2, 2, window=2), 0, 2)
    monkeypatch.setattr(stream, "load_from_store", lambda source: (reader, [windows]))
    monkeypatch.setattr(stream, "Instruments", Recorded)
    stream._instruments.cache_clear()
    stream._block_memory.cache_clear()
    take_read_bytes()
    numbers = {"id": np.array([0])}
    blocks = list(stream.read_window(numbers, source=["a reference"], run="mine"))
    assert [int(block["block"][0]) for block in blocks] == [0, 1]
    assert added == [("nev_s3_read_bytes", 500, "mine")]
    list(stream.read_window(numbers, source=["a reference"]))
    assert len(added) == 1
    stream._instruments.cache_clear()
    stream._block_memory.cache_clear()

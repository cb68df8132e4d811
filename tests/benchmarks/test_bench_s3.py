"""The object store of the S3 benchmark serves what nev reads, and counts it."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.pictures import rows_of, write_shard

from benchmarks.contestants import object_store, streams
from benchmarks.contestants.pictures import KEY, WIDTH, _vectors
from nev.config.data import Columns
from nev.data.index import build_index
from nev.data.text_sidecar import write_sidecar
from nev.storage import s3 as s3_module
from nev.storage.files import filesystem


def test_an_epoch_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "LATENCY_S", 0.0)
    folder = tmp_path / "bucket/set"
    for name in ("a", "b"):
        write_shard(folder / f"{name}.parquet", rows_of(32, first=100 * ord(name), width=400, height=400), [8] * 4)
    index = build_index(str(folder), Columns())
    for shard in range(2):
        write_sidecar(index, shard, KEY, WIDTH, _vectors)
    with object_store.object_store(tmp_path) as address:
        monkeypatch.delenv("AWS_PROFILE", raising=False)
        for name, value in {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        s3_module._filesystem.cache_clear()
        monkeypatch.setattr("nev.data.plan.WINDOW_ROWS", 16)
        monkeypatch.setattr("nev.data.plan.UNEVEN_BLOCKS", 2)
        even, uneven = (streams.count_epoch("s3://bucket/set", str(folder), address, block) for block in (8, 10))
        assert filesystem("s3://bucket/set")[0].cat_file("bucket/set/a.parquet") == (folder / "a.parquet").read_bytes()
        assert not filesystem("s3://bucket/set")[0].exists("bucket/set/absent")
    s3_module._filesystem.cache_clear()
    assert even.requests_a_group == 2 + 4 / 8  # pictures and vectors of eight row groups, and four footers
    assert even.bytes_vs_data < 1.5  # so small a file is read whole for its footer
    assert uneven.bytes_vs_data > 1.1 * even.bytes_vs_data

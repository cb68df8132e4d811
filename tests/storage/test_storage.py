"""Storage: S3 over HTTP, through faults, gives what the local folder gives; failures for good name the object."""

import logging
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers.fresh import run_in_fresh_process
from helpers.pictures import WIDTH, encode, rows_of, write_shard
from helpers.s3_server import Proxy, mixed_faults

from nev.config.base import ConfigError
from nev.config.data import Augment, Columns, Limits
from nev.data.block import Block, BlockReader
from nev.data.block_plan import Segment
from nev.data.index import Index, build_index
from nev.data.plan import Plan
from nev.data.sidecar import missing_sidecars, sidecars_to_write
from nev.data.text_sidecar import check_sidecars, sidecar_key, text_sidecars, write_sidecar
from nev.storage import s3 as s3_module
from nev.storage.files import filesystem
from nev.storage.reading import DataError

KEY = sidecar_key("tower", "caption")
REMOTE = "s3://bucket/set/train"
SHARDS = ("a.parquet", "sub/b.parquet")


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """Two shards of 24 rows, row groups of 8, columns beside those that nev reads."""
    for number, name in enumerate(SHARDS):
        write_shard(tmp_path / "train" / name, rows_of(24, first=100 * number, width=100, height=80), [8, 8, 8])
    return tmp_path / "train"


def upload(folder: Path) -> None:
    fs, path = filesystem(REMOTE)
    for shard in SHARDS:
        fs.pipe_file(f"{path}/{shard}", (folder / shard).read_bytes())


def embedded(root: str) -> Index:
    index = build_index(root, Columns())
    for shard in missing_sidecars(text_sidecars(index, KEY, WIDTH)):
        write_sidecar(index, shard, KEY, WIDTH, encode)
    check_sidecars(index, KEY, WIDTH)
    return index


def reader_over(index: Index) -> BlockReader:
    return BlockReader(index, 16, Limits(), 5, Augment(scale=(0.5, 1.0)), KEY, WIDTH)


def plan_over(index: Index) -> Plan:
    return Plan(index.rows, 3, global_batch=8, block_rows=8)


def epoch(index: Index) -> list[Block]:
    reader, plan = reader_over(index), plan_over(index)
    return [next(reader.read_blocks(plan.make_window(block))) for block in range(plan.steps_per_epoch)]


def assert_same(blocks: list[Block], expected: list[Block]) -> None:
    assert len(blocks) == len(expected) > 0
    for block, wanted in zip(blocks, expected, strict=True):
        assert block.keys() - {"block"} == wanted.keys()
        assert all(np.array_equal(block[name], column) for name, column in wanted.items())
        assert block["valid"].all()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["500", "503", "drop", "cut", "trickle", "stall"])
def test_every_row_comes_through_every_fault(
    fault: str, local: Path, s3: Proxy, impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    expected = embedded(str(local))
    upload(local)
    # The first try of each request fails (two where the connection is dropped: aiohttp makes up for one). The bodies of
    # answers other than to reads of files are left whole: s3fs does not fetch those again.
    tries = 2 if fault == "drop" else 1
    ending = {"stall": "a.parquet", "500": "", "503": "", "drop": ""}.get(fault, ".parquet")

    def rule(method: str, path: str, span: str, before: int) -> str | None:
        return fault if before < tries and path.endswith(ending) and (span or not ending) else None

    s3.rule = rule
    with caplog.at_level(logging.WARNING, "nev.storage"):
        index = embedded(REMOTE)
        assert index.fingerprint == expected.fingerprint
        assert_same(epoch(index), epoch(expected))
    s3.rule = lambda *_: None
    assert s3.broken[fault] > 5
    for shard in range(2):
        with filesystem(text_sidecars(expected, KEY, WIDTH).location(shard))[0].open(
            text_sidecars(expected, KEY, WIDTH).location(shard)
        ) as own:
            assert filesystem(REMOTE)[0].cat_file(text_sidecars(index, KEY, WIDTH).location(shard)) == own.read()
    warnings = [record.getMessage() for record in caplog.records if record.name == "nev.storage"]
    assert bool(warnings) == (fault != "trickle")
    if fault in ("500", "503", "drop"):
        assert any("GetObject" in text and "/bucket/set/train/sub/b.parquet" in text for text in warnings)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["500", "503", "403", "drop", "cut"])
def test_a_failure_for_good_is_bounded_and_names_the_object(
    fault: str, local: Path, s3: Proxy, impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    upload(local)
    index = embedded(REMOTE)
    reader, plan = reader_over(index), plan_over(index)
    shard = index.paths.index("sub/b.parquet")
    block = next(k for k in range(plan.steps_per_epoch) if index.shard[plan.make_window(k).segments[0].group] == shard)
    refused = "/bucket/set/train/sub/b.parquet"
    s3.reset()
    s3.rule = lambda method, path, span, before: fault if path == refused and method == "GET" else None
    with pytest.raises(DataError, match=r"s3://bucket/set/train/sub/b\.parquet: row group .* cannot be read") as caught:
        next(reader.read_blocks(plan.make_window(block)))
    tries = s3.count("GET", refused)
    assert (
        tries
        == {
            "500": s3_module.REQUEST_TRIES,
            "403": 1,
            "cut": s3_module.BODY_TRIES,
            "503": s3_module.REQUEST_TRIES * s3_module.BODY_TRIES,
            "drop": s3_module.REQUEST_TRIES * s3_module.BODY_TRIES * 2,  # aiohttp connects twice a try
        }[fault]
    )
    assert ("AWS_PROFILE" if fault == "403" else "AWS_ENDPOINT_URL") in str(caught.value)
    told = [record for record in caplog.records if record.name == "nev.storage"]
    assert len(told) >= (0 if fault == "403" else tries // 2)
    assert not (fault == "403" and told)


def test_aws_max_attempts_bounds_the_tries(
    local: Path, s3: Proxy, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    upload(local)
    s3.reset()
    s3.rule = lambda method, path, span, before: "500" if span else None
    with pytest.raises(DataError, match=r"s3://bucket/set/train/a\.parquet cannot be read .*AWS_ENDPOINT_URL"):
        build_index(REMOTE, Columns())
    assert s3.count("GET", "/a.parquet") == 2


@pytest.mark.parametrize("tries", ["x", "0", ""])
def test_aws_max_attempts_is_a_number(tries: str, s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", tries)
    s3_module._filesystem.cache_clear()
    with pytest.raises(ConfigError, match=rf"AWS_MAX_ATTEMPTS={tries}: set it to the number of tries"):
        build_index(REMOTE, Columns())


def test_what_is_missing_or_refused_is_named(local: Path, s3: Proxy, impatient: None) -> None:
    with pytest.raises(DataError, match=r"s3://bucket/set/train: no such folder"):
        build_index(REMOTE, Columns())
    with pytest.raises(DataError, match=r"s3://elsewhere/set: no such folder"):
        build_index("s3://elsewhere/set", Columns())
    upload(local)
    index = build_index(REMOTE, Columns())
    with pytest.raises(DataError, match=r"s3://bucket/set/train: 2 of 2 shards have no text sidecar"):
        check_sidecars(index, KEY, WIDTH)
    embedded(REMOTE)
    filesystem(REMOTE)[0].rm_file("bucket/set/train/a.parquet")
    with pytest.raises(DataError, match=r"s3://bucket/set/train/a\.parquet.* cannot be read .*restore it"):
        epoch(index)
    s3.rule = lambda *_: "403"
    with pytest.raises(DataError, match=r"s3://bucket/set/train cannot be read .*AWS_PROFILE"):
        build_index(REMOTE, Columns())
    with pytest.raises(DataError, match=r"s3://bucket/set/train/_text/.* cannot be read .*AWS_PROFILE"):
        missing_sidecars(text_sidecars(index, KEY, WIDTH))


def test_storage_that_refuses_is_no_reason_to_embed_anew(local: Path, s3: Proxy, impatient: None) -> None:
    upload(local)
    index = embedded(REMOTE)
    assert sidecars_to_write(text_sidecars(index, KEY, WIDTH)) == []
    s3.rule = lambda method, path, span, before: "403" if "_text" in path else None
    with pytest.raises(DataError, match=r"_text/.* cannot be read .*AWS_PROFILE"):
        sidecars_to_write(text_sidecars(index, KEY, WIDTH))


def test_a_shard_written_anew_under_a_reader_is_noticed(local: Path, s3: Proxy, impatient: None) -> None:
    upload(local)
    index = embedded(REMOTE)
    reader, plan = reader_over(index), plan_over(index)
    block = next(k for k in range(plan.steps_per_epoch) if index.shard[plan.make_window(k).segments[0].group] == 0)
    next(reader.read_blocks(plan.make_window(block)))  # the shard is open now
    write_shard(local / "a.parquet", rows_of(24, first=500, width=100, height=80), [8, 8, 8])
    upload(local)
    with pytest.raises(DataError, match=r"s3://bucket/set/train/a\.parquet: row group"):
        next(reader.read_blocks(plan.make_window(block)))


def test_what_another_process_writes_is_seen(local: Path, s3: Proxy, impatient: None) -> None:
    upload(local)
    index = build_index(REMOTE, Columns())
    write_sidecar(index, 1, KEY, WIDTH, encode)
    mine = filesystem(REMOTE)[0]
    assert len(mine.find("bucket/set/train")) == 3  # a listing that must not be kept
    s3_module._filesystem.cache_clear()  # what is written now, a filesystem of its own writes
    write_sidecar(index, 0, KEY, WIDTH, encode)
    assert filesystem(REMOTE)[0] is not mine
    assert mine.exists(text_sidecars(index, KEY, WIDTH).location(0).removeprefix("s3://"))


def test_no_credentials_and_no_server_are_told(s3: Proxy, impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"s3://bucket/set cannot be read .*Could not connect.*AWS_ENDPOINT_URL"):
        build_index("s3://bucket/set", Columns())
    s3_module._filesystem.cache_clear()
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(DataError, match=r"s3://bucket/set cannot be read .*nobody.*AWS_PROFILE"):
        build_index("s3://bucket/set", Columns())


def test_requests_are_few(local: Path, s3: Proxy) -> None:
    upload(local)
    s3.reset()
    index = build_index(REMOTE, Columns())
    assert s3.count("HEAD") == 0
    assert s3.count("GET", ".parquet") == 2  # one a shard: its footer
    s3.reset()
    write_sidecar(index, 0, KEY, WIDTH, encode)
    assert s3.count("GET", "train/a.parquet") == 1 + 2 * 3  # the footer, uid and caption of each row group
    assert s3.count("PUT") == 1
    assert sum(s3.seen.values()) == 2 * 3 + 3  # the shard's size besides
    index = embedded(REMOTE)
    reader, plan = reader_over(index), plan_over(index)
    seen: list[tuple[int, int]] = []
    for block in range(plan.steps_per_epoch):
        s3.reset()
        next(reader.read_blocks(plan.make_window(block)))
        seen.append((s3.count("HEAD"), s3.count("GET")))
    # A row group and its vectors are one request each. A file's first use reads its footer besides; one sidecar was not there
    # yet when the set was indexed, so its first use asks for its size.
    assert sorted(seen) == [(0, 2)] * 4 + [(0, 4), (1, 4)]
    reader = reader_over(build_index(REMOTE, Columns()))
    s3.reset()
    for block in range(plan.steps_per_epoch):
        next(reader.read_blocks(plan.make_window(block)))
    assert s3.count("HEAD") == 0
    assert s3.count("GET") == 2 * plan.steps_per_epoch + 4


@pytest.mark.slow
def test_open_files_keep_no_row_group(tmp_path: Path, s3: Proxy) -> None:
    fs, path = filesystem(REMOTE)
    rng = np.random.default_rng(0)
    for number in range(12):
        rows = [{**row, "image": rng.bytes(2**16)} for row in rows_of(8, first=100 * number)]
        write_shard(tmp_path / "shard.parquet", rows, [8])
        fs.pipe_file(f"{path}/{number:02}.parquet", (tmp_path / "shard.parquet").read_bytes())
    smallest, largest, in_memory = run_in_fresh_process(bytes_held_by_open_files)
    assert smallest > 2**19
    assert in_memory < 2 * largest


def bytes_held_by_open_files() -> tuple[int, int, int]:
    """The smallest and largest row group of `REMOTE` in bytes, and what a reader holds after it has read all but the first."""
    index = build_index(REMOTE, Columns())
    reader = BlockReader(index, 16, Limits(), 5, None)
    reader.read([Segment(0, 0, 8)])
    tracemalloc.start()
    for group in range(1, 12):
        reader.read([Segment(group, 0, 8)])
    return int(index.nbytes.min()), int(index.nbytes.max()), tracemalloc.get_traced_memory()[0]


def test_a_sidecar_that_cannot_be_written_is_named_and_leaves_nothing(local: Path, s3: Proxy, impatient: None) -> None:
    upload(local)
    index = build_index(REMOTE, Columns())
    s3.rule = lambda method, path, span, before: "403" if method == "PUT" else None
    with pytest.raises(DataError, match=r"s3://bucket/set/train/_text/.*/a\.parquet cannot be written .*AWS_PROFILE"):
        write_sidecar(index, 0, KEY, WIDTH, encode)
    assert s3.count("PUT", "/bucket") == 0  # nobody tried to make the bucket
    s3.reset()
    assert missing_sidecars(text_sidecars(index, KEY, WIDTH)) == [0, 1]


@pytest.mark.ray
@pytest.mark.slow
def test_the_stream_over_s3_holds_every_row_in_order_through_mixed_faults(
    local: Path, s3: Proxy, ray_cluster: None
) -> None:
    from nev.data.stream import make_stream

    expected = epoch(embedded(str(local)))
    upload(local)
    index = embedded(REMOTE)
    plan = plan_over(index)
    s3.reset()
    s3.rule = mixed_faults(seed=2, share=0.6)
    stream = make_stream(reader_over(index), plan, 0, plan.steps_per_epoch)
    blocks = list(stream.iter_batches(batch_size=None, batch_format="numpy"))
    assert sum(s3.broken.values()) > 3
    assert len(s3.broken) > 2
    assert_same(blocks, expected)
    uids = np.concatenate([block["uid"] for block in blocks])
    assert len(set(uids)) == 48


@pytest.mark.ray
@pytest.mark.slow
def test_the_stream_over_s3_stops_with_the_name_of_what_fails_for_good(
    local: Path, s3: Proxy, ray_cluster: None
) -> None:
    from ray.exceptions import RayTaskError

    from nev.data.stream import make_stream

    upload(local)
    index = embedded(REMOTE)
    plan = plan_over(index)
    s3.rule = lambda method, path, span, before: "403" if path.endswith("train/sub/b.parquet") else None
    stream = make_stream(reader_over(index), plan, 0, plan.steps_per_epoch)
    with pytest.raises(RayTaskError, match=r"s3://bucket/set/train/sub/b\.parquet: row group"):
        list(stream.iter_batches(batch_size=None))

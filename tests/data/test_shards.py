"""Shards: layout, order, bounded memory, and the first of equal rows."""

import random
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nev.config.base import ConfigError
from nev.config.data import Limits
from nev.data.prepare import scatter
from nev.data.prepare.filters import Filters
from nev.data.prepare.pipeline import PrepareReport, prepare
from nev.data.prepare.scatter import BUCKET_BYTES
from nev.data.prepare.shards import Layout
from nev.data.rows import Row, usable_rows
from nev.data.sources import Part, Source, make_source


def rows(count: int, **more: Any) -> list[Row]:
    made: list[Any] = [
        {"uid": f"row-{k}", "image": f"bytes of {k}".encode(), "caption": f"caption {k}", **more} for k in range(count)
    ]
    return made


def uids(paths: list[Path]) -> list[str]:
    return [uid for path in paths for uid in pq.read_table(path, columns=["uid"])["uid"].to_pylist()]


def write_shards(rows: Iterable[Row], folder: Path, **options: Any) -> list[Path]:
    return [Path(shard) for shard in prepare(make_source(rows), folder, **options).shards]


def in_parts(rows: list[Row], count: int, buckets: int) -> Source:
    size = -(-len(rows) // count)
    parts = [rows[at : at + size] for at in range(0, len(rows), size)]
    return Source(
        [Part(f"p{at}", part) for at, part in enumerate(parts)], iter, buckets * BUCKET_BYTES, {"rows": len(rows)}
    )


def test_rows_come_back_whole_in_row_groups_of_the_asked_size(tmp_path: Path) -> None:
    paths = write_shards(rows(50), tmp_path / "train", seed=0, layout=Layout(16, 4))
    assert [path.name for path in paths] == ["00000.parquet", "00001.parquet", "00002.parquet", "00003.parquet"]
    groups = [
        [file.row_group(k).num_rows for k in range(file.num_row_groups)]
        for file in (pq.read_metadata(path) for path in paths)
    ]
    assert groups == [[4] * 4, [4] * 4, [4] * 4, [2]]
    table = pa.concat_tables([pq.read_table(path) for path in paths])
    assert table.schema.names == ["uid", "image", "caption"]
    assert sorted(table.to_pylist(), key=lambda row: row["uid"]) == sorted(rows(50), key=lambda row: row["uid"])


def test_columns_and_how_they_are_stored(tmp_path: Path) -> None:
    made: list[Row] = [
        {"uid": "a", "image": b"x" * 100, "caption": ["one", "two"], "label": 3, "label_name": "cat"},
        {"uid": "b", "image": b"y" * 100, "caption": "three", "label": None},
    ]
    (path,) = write_shards(made, tmp_path, seed=0)
    kinds = [pa.string(), pa.binary(), pa.list_(pa.string()), pa.int64(), pa.string()]
    names = ["uid", "image", "caption", "label", "label_name"]
    assert pq.read_schema(path).equals(pa.schema(list(zip(names, kinds, strict=True))))
    captions = {row["uid"]: row["caption"] for row in pq.read_table(path).to_pylist()}
    assert captions == {"a": ["one", "two"], "b": ["three"]}
    group = pq.read_metadata(path).row_group(0)
    stored = {group.column(k).path_in_schema: group.column(k) for k in range(group.num_columns)}
    assert stored["image"].compression == "UNCOMPRESSED"
    assert stored["caption.list.element"].compression == stored["uid"].compression == "ZSTD"
    assert "RLE_DICTIONARY" not in stored["image"].encodings + stored["uid"].encodings
    assert stored["label"].statistics.null_count == 1
    assert stored["image"].statistics is None


def test_order_is_random_and_depends_on_the_seed_and_the_uids_alone(tmp_path: Path) -> None:
    first = uids(write_shards(rows(600), tmp_path / "a", seed=1))
    assert uids(write_shards(reversed(rows(600)), tmp_path / "b", seed=1)) == first
    assert uids(write_shards(rows(600), tmp_path / "c", seed=2)) != first
    at = [int(uid.removeprefix("row-")) for uid in first]
    # A random permutation has about as many rises as falls (standard deviation 7), and its halves have one mean.
    assert abs(sum(b > a for a, b in pairwise(at)) - 300) < 40
    assert abs(sum(at[:300]) / 300 - 300) < 50


def test_rows_beyond_the_memory_bound_give_the_same_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[str, int]] = []
    write_run = scatter._write_run

    def watched(location: str, rows: list[Row], *more: Any) -> Any:
        runs.append((location, len(rows)))
        return write_run(location, rows, *more)

    monkeypatch.setattr(scatter, "_write_run", watched)
    made = [*rows(300, label=1), *rows(10)]
    held = prepare(make_source(made), tmp_path / "a/set")
    assert [count for _, count in runs] == [310]
    runs.clear()
    bound = 61 * 1024  # a row counts 1,024 bytes, its image, and its captions with 60 bytes each
    spilt = prepare(make_source(made, nbytes=5 * BUCKET_BYTES), tmp_path / "b/set", memory_bytes=bound)
    assert [count for _, count in runs] == [57, 57, 57, 57, 57, 25]
    assert held.dropped == spilt.dropped == {"duplicate uid": 10}
    assert contents(held) == contents(spilt)
    assert [path.name for path in (tmp_path / "b/set").iterdir()] == ["00000.parquet"]


def contents(report: PrepareReport) -> list[bytes]:
    return [Path(shard).read_bytes() for shard in report.shards]


@pytest.mark.slow
@settings(max_examples=25)
@given(
    count=st.integers(1, 120),
    parts=st.integers(1, 7),
    buckets=st.integers(1, 40),
    memory_rows=st.integers(1, 130),
    seed=st.integers(0, 5),
    turn=st.randoms(use_true_random=False),
)
def test_the_result_depends_on_the_rows_and_the_seed_alone(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    parts: int,
    buckets: int,
    memory_rows: int,
    seed: int,
    turn: random.Random,
) -> None:
    folder, layout = tmp_path_factory.mktemp("set"), Layout(16, 4)
    made = rows(count)
    plain = prepare(make_source(made), folder / "plain/set", seed=seed, layout=layout)
    turn.shuffle(made)
    cut = prepare(
        in_parts(made, parts, buckets), folder / "cut/set", seed=seed, layout=layout, memory_bytes=memory_rows * 1024
    )
    assert contents(plain) == contents(cut)
    assert plain.rows_written == cut.rows_written == count
    groups = [pq.read_metadata(shard).row_group(0).num_rows for shard in cut.shards]
    assert [pq.read_metadata(shard).num_rows for shard in cut.shards] == [16] * (count // 16) + [count % 16] * (
        count % 16 > 0
    )
    assert set(groups[:-1]) <= {4}


@settings(max_examples=25)
@given(
    drawn=st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from([b"1", b"2", b"3"])), min_size=1, max_size=25),
    parts=st.integers(1, 5),
    buckets=st.integers(1, 9),
    unique=st.booleans(),
)
def test_of_equal_uids_and_images_the_first_in_the_input_stays(
    tmp_path_factory: pytest.TempPathFactory,
    drawn: list[tuple[str, bytes]],
    parts: int,
    buckets: int,
    unique: bool,
) -> None:
    made: list[Row] = [{"uid": uid, "image": image, "caption": str(at)} for at, (uid, image) in enumerate(drawn)]
    report = prepare(
        in_parts(made, parts, buckets),
        tmp_path_factory.mktemp("set") / "set",
        filters=Filters(unique=unique),
        memory_bytes=3 * 1024,
        layout=Layout(2, 1),
    )
    first = {uid: at for at, (uid, _) in reversed(list(enumerate(drawn)))}
    left = sorted(first.values())
    if unique:
        left = sorted({drawn[at][1]: at for at in reversed(left)}.values())
    found = [caption for shard in report.shards for caption in pq.read_table(shard)["caption"].to_pylist()]
    assert sorted(map(int, found)) == left
    wanted = {"duplicate uid": len(drawn) - len(first), "duplicate image": len(first) - len(left)}
    assert report.dropped == {reason: count for reason, count in wanted.items() if count}


def test_a_row_that_another_rule_drops_does_not_stand_for_its_image(tmp_path: Path) -> None:
    made: list[Row] = [
        {"uid": "short", "image": b"1", "caption": "x"},
        {"uid": "long", "image": b"1", "caption": "xyz"},
    ]
    report = prepare(make_source(made), tmp_path / "set", filters=Filters(unique=True, min_caption=3))
    assert uids([Path(report.shards[0])]) == ["long"]
    assert report.dropped == {"caption length": 1}


def test_a_folder_with_shards_is_refused_unless_overwrite(tmp_path: Path) -> None:
    write_shards(rows(40), tmp_path, seed=0, layout=Layout(8, 8))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"already holds 5 shard\(s\).*--overwrite"):
        write_shards(rows(3), tmp_path, seed=0)
    write_shards(rows(3), tmp_path, seed=0, layout=Layout(overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.parquet", "notes.txt"]
    (tmp_path / "foreign.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"holds other parquet files \(foreign\.parquet"):
        write_shards(rows(3), tmp_path, seed=0, layout=Layout(overwrite=True))


def test_shards_in_a_folder_below_are_refused_as_they_would_be_read(tmp_path: Path) -> None:
    write_shards(rows(3), tmp_path / "train/old", seed=0)
    with pytest.raises(ConfigError, match=r"holds other parquet files \(old/00000\.parquet"):
        write_shards(rows(3), tmp_path / "train", seed=0, layout=Layout(overwrite=True))
    (tmp_path / "train/old").rename(tmp_path / "train/_old")  # the index does not look there either
    write_shards(rows(3), tmp_path / "train", seed=0)


def test_wrong_settings_and_empty_input_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\(1000\) must be a positive multiple of rows per row group \(256\)"):
        write_shards(rows(3), tmp_path, seed=0, layout=Layout(rows_per_shard=1000))
    with pytest.raises(ConfigError, match="no rows to write"):
        write_shards([], tmp_path / "set", seed=0)
    with pytest.raises(ConfigError, match=r"no rows to write\. Dropped by reason: empty image \(1\)"):
        write_shards(rows(1, image=None), tmp_path / "set", seed=0)
    assert not list(tmp_path.glob("*/*.parquet"))


def test_unusable_rows_are_counted_by_reason() -> None:
    def row(uid: str, image: bytes | None = b"x", caption: str | list[str] | None = "ok") -> Row:
        return {"uid": uid, "image": image, "caption": caption}

    made = [
        row("good"),
        row("cleaned", caption=["", " two ", None, "three"]),  # type: ignore[list-item]
        row(""),
        row("a", image=b""),
        row("b", image=None),
        row("c", image=b"x" * 11),
        row("d", caption=None),
        row("e", caption=" \n"),
        row("f", caption=[]),
        row("g", caption=[""]),
        {**row("h"), "reject": "status failed"},
        {**row("i"), "label": 2**63},
        {**row("j"), "label": 0, "label_name": "\ud83d"},
        {**row("k"), "caption": "\ud83d"},
    ]
    dropped: Counter[str] = Counter()
    kept = list(usable_rows(made, dropped, Limits(max_bytes=10)))  # type: ignore[arg-type]
    assert [(row["uid"], row["caption"]) for row in kept] == [("good", ["ok"]), ("cleaned", ["two", "three"])]
    assert dropped == {
        "empty uid": 1,
        "empty image": 2,
        "image over 10 bytes": 1,
        "empty caption": 4,
        "status failed": 1,
        "label beyond 64 bits": 1,
        "uid, caption or class name with half a surrogate pair": 2,
    }


def test_reasons_of_a_source_are_bounded() -> None:
    rows = [
        {"uid": f"{n}", "image": b"x", "caption": "x", "reject": f"status {n}\ud83d" + "y" * 200} for n in range(150)
    ]
    dropped: Counter[str] = Counter()
    assert not list(usable_rows(rows, dropped, Limits()))  # type: ignore[arg-type]
    assert len(dropped) == 101
    assert dropped["other reasons"] == 50
    assert all(len(reason.encode()) <= 100 for reason in dropped)

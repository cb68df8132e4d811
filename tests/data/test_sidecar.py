"""Text sidecars: row for row beside their shards, whole or absent, refused where they do not match."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.blocks import KEY, embedded, reader_of, three_shards, whole
from helpers.pictures import WIDTH, encode, encoded, photo, rows_of, vector_of, write_shard

from nev.config.data import Columns
from nev.data.index import Index, build_index
from nev.data.sidecar import decode_vectors, missing_sidecars, sidecars_to_write
from nev.data.text_sidecar import check_sidecars, sidecar_key, text_sidecars, write_sidecar
from nev.storage.reading import DataError


def test_sidecars_lie_beside_their_shards_row_for_row(tmp_path: Path) -> None:
    rows = [row | {"caption": [row["caption"], "shared by all"][: n % 3]} for n, row in enumerate(rows_of(9))]
    write_shard(tmp_path / "deep" / "a.parquet", rows, [4, 0, 5])
    index = build_index(str(tmp_path), Columns())
    asked: list[str] = []

    def counting(captions: Sequence[str]) -> np.ndarray:
        asked.extend(captions)
        return encode(captions)

    assert write_sidecar(index, 0, KEY, WIDTH, counting) == sum(n % 3 for n in range(9))
    assert len(asked) == len(set(asked)) == 7  # each distinct caption once
    path = tmp_path / "_text" / KEY[:16] / "deep" / "a.parquet"
    assert text_sidecars(index, KEY, WIDTH).location(0) == str(path)
    file = pq.ParquetFile(path)
    assert [file.metadata.row_group(group).num_rows for group in range(3)] == [4, 0, 5]
    table = file.read()
    assert table["uid"].to_pylist() == [row["uid"] for row in rows]
    vectors, starts = decode_vectors(table["vectors"], WIDTH)
    assert vectors.dtype == np.float16
    assert np.diff(starts).tolist() == [n % 3 for n in range(9)]
    assert np.array_equal(vectors, [vector_of(caption) for row in rows for caption in row["caption"]])
    check_sidecars(index, KEY, WIDTH)
    block = reader_of(index).read(whole(index))
    assert block["valid"].tolist() == [n % 3 > 0 for n in range(9)]


def test_a_shard_without_any_caption_has_a_sidecar_too(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", [row | {"caption": ""} for row in rows_of(3)], [3])
    index = embedded(tmp_path)
    check_sidecars(index, KEY, WIDTH)
    block = reader_of(index).read(whole(index))
    assert block["reason"].tolist() == ["caption is empty"] * 3
    assert not block["text"].any()


def test_missing_sidecars_are_counted_and_named(tmp_path: Path) -> None:
    index = embedded(three_shards(tmp_path))
    check_sidecars(index, KEY, WIDTH)
    Path(text_sidecars(index, KEY, WIDTH).location(1)).unlink()
    assert (
        missing_sidecars(text_sidecars(index, KEY, WIDTH)) == sidecars_to_write(text_sidecars(index, KEY, WIDTH)) == [1]
    )
    with pytest.raises(DataError, match=r"1 of 3 shards .* \(first: b\.parquet\)\. Write them with `nev embed-text"):
        check_sidecars(index, KEY, WIDTH)
    with pytest.raises(DataError, match=r"3 of 3 shards have no text sidecar of this encoder"):
        check_sidecars(index, sidecar_key("another tower", "caption"), WIDTH)


def test_the_key_names_the_tower_and_the_column() -> None:
    keys = {sidecar_key(tower, column) for tower in ("a", "b", "a\nb") for column in ("caption", "b", "text")}
    assert len(keys) == 9
    assert sidecar_key("a", "caption") == sidecar_key("a", "caption")


def other_key(index: Index, path: Path) -> None:
    other = KEY[:16] + "0" * 48  # lies at the same place, since the folder has 16 digits of the key
    write_sidecar(index, 0, other, WIDTH, encode)


def other_width(index: Index, path: Path) -> None:
    write_sidecar(index, 0, KEY, WIDTH // 2, lambda captions: encode(captions)[:, : WIDTH // 2])


def cut_short(index: Index, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def without_metadata(index: Index, path: Path) -> None:
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)


def other_groups(index: Index, path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table, path, row_group_size=4)


def shard_grew(index: Index, path: Path) -> None:
    write_shard(Path(index.location(0)), rows_of(13), [5, 1, 7])


def shard_split_otherwise(index: Index, path: Path) -> None:
    write_shard(Path(index.location(0)), rows_of(12), [6, 6])


def captions_changed(index: Index, path: Path) -> None:
    write_shard(Path(index.location(0)), [row | {"caption": "other words"} for row in rows_of(12)], [5, 1, 6])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_key, r"nev\.key is "),
        (other_width, r"nev\.width is 4, this run needs 8"),
        (cut_short, "cannot be read"),
        (without_metadata, r"nev\.key is None"),
        (other_groups, "its rows are not those of the shard"),
        (shard_grew, r"nev\.shard is "),
        (shard_split_otherwise, r"nev\.shard is "),
        (captions_changed, r"nev\.shard is "),
    ],
)
def test_a_sidecar_that_does_not_match_is_refused_with_a_remedy(change: Any, message: str, tmp_path: Path) -> None:
    index = embedded(three_shards(tmp_path))
    path = Path(text_sidecars(index, KEY, WIDTH).location(0))
    change(index, path)
    with pytest.raises(DataError, match=rf"{path.name}:? {message}(.|\n)*write it again"):
        check_sidecars(build_index(str(tmp_path), Columns()), KEY, WIDTH)
    after = build_index(str(tmp_path), Columns())
    assert sidecars_to_write(text_sidecars(after, KEY, WIDTH)) == [0]
    write_sidecar(after, 0, KEY, WIDTH, encode)
    assert sidecars_to_write(text_sidecars(after, KEY, WIDTH)) == []
    check_sidecars(after, KEY, WIDTH)


@pytest.mark.parametrize("groups", [[6], [3, 3]])
def test_rows_in_another_order_are_noticed_though_no_size_tells(groups: list[int], tmp_path: Path) -> None:
    """Preparing a small set again with another seed leaves row groups of the same rows and bytes."""
    rows = [row | {"image": encoded(photo(n), "BMP"), "caption": f"{n} apples"} for n, row in enumerate(rows_of(6))]
    write_shard(tmp_path / "a.parquet", rows, groups)
    before = embedded(tmp_path)
    write_shard(tmp_path / "a.parquet", rows[::-1], groups)
    after = build_index(str(tmp_path), Columns())
    assert after.fingerprint == before.fingerprint  # what footers can tell is the same
    with pytest.raises(DataError, match=r"a\.parquet: its rows are not those of the shard.*write it again"):
        reader_of(after).read(whole(after))
    with pytest.raises(DataError, match="its rows are not those of the shard"):
        check_sidecars(after, KEY, WIDTH, every_row=len(groups) > 1)  # as for data.val


def test_a_sidecar_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "a.parquet", rows_of(6), [3, 3])
    index = build_index(str(tmp_path), Columns())

    def failing(captions: Sequence[str]) -> np.ndarray:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        write_sidecar(index, 0, KEY, WIDTH, failing)
    assert missing_sidecars(text_sidecars(index, KEY, WIDTH)) == [0]
    with pytest.raises(ValueError, match=r"gave \(6, 8\) for 6 captions of width 4"):
        write_sidecar(index, 0, KEY, WIDTH // 2, encode)
    assert missing_sidecars(text_sidecars(index, KEY, WIDTH)) == [0]

    written = pq.ParquetWriter.write_table
    calls = []

    def breaking(self: pq.ParquetWriter, *args: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError("disk full")
        written(self, *args, **options)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", breaking)
    with pytest.raises(DataError, match=r"cannot be written \(disk full\)"):
        write_sidecar(index, 0, KEY, WIDTH, encode)
    monkeypatch.undo()
    assert missing_sidecars(text_sidecars(index, KEY, WIDTH)) == [0]
    with pytest.raises(DataError, match="no text sidecar"):
        check_sidecars(index, KEY, WIDTH)
    assert write_sidecar(index, 0, KEY, WIDTH, encode) == 6
    check_sidecars(index, KEY, WIDTH)
    assert build_index(str(tmp_path), Columns()).fingerprint == index.fingerprint  # sidecars are no shards


def test_a_copy_of_the_folder_takes_its_sidecars_along(tmp_path: Path) -> None:
    embedded(three_shards(tmp_path / "here"))
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    check_sidecars(build_index(str(tmp_path / "there"), Columns()), KEY, WIDTH)


def test_vectors_of_any_slice_of_a_column() -> None:
    counts = [2, 0, 1, 3, 1]
    vectors = np.arange(7 * WIDTH, dtype="<f2").reshape(7, WIDTH)
    cuts = np.cumsum([0, *counts])
    array = pa.array([vectors[cuts[k] : cuts[k + 1]].tobytes() for k in range(5)], pa.binary())
    for column in (pa.chunked_array([array]), pa.chunked_array([array[:2], array[2:]])):
        for start in range(6):
            for stop in range(start, 6):
                found, starts = decode_vectors(column.slice(start, stop - start), WIDTH)
                mine = [found[starts[k] : starts[k + 1]] for k in range(stop - start)]
                assert [len(part) for part in mine] == counts[start:stop]
                assert np.array_equal(np.concatenate([vectors[:0], *mine]), vectors[cuts[start] : cuts[stop]])


def test_a_column_that_stays_in_chunks_keeps_all_its_rows() -> None:
    """PyArrow leaves a binary column of more than 2 GiB in chunks, even when asked to combine them."""
    vectors = np.arange(5 * 2 * 3, dtype=np.float16).reshape(10, 3)
    rows = [vectors[:2], vectors[2:2], vectors[2:5], vectors[5:9], vectors[9:]]
    encoded = [row.astype("<f2").tobytes() for row in rows]
    column = pa.chunked_array([pa.array(encoded[:2]), pa.array([], pa.binary()), pa.array([b"skip", *encoded[2:]])[1:]])
    stays = SimpleNamespace(chunks=column.chunks, combine_chunks=lambda: column)
    for given in (column, stays):
        found, starts = decode_vectors(given, 3)
        assert np.array_equal(found, vectors)
        assert starts.tolist() == [0, 2, 2, 5, 9, 10]
    found, starts = decode_vectors(pa.chunked_array([], pa.binary()), 3)
    assert (found.shape, starts.tolist()) == ((0, 3), [0])


def test_vectors_of_one_chunk_are_not_copied() -> None:
    column = pa.chunked_array([pa.array([np.ones(6, "<f2").tobytes()] * 4)])[1:3]
    found, starts = decode_vectors(column, 3)
    assert starts.tolist() == [0, 2, 4]
    assert found.base is not None
    data = column.chunk(0).buffers()[2]
    assert found.__array_interface__["data"][0] == data.address + 12

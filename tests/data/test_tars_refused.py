"""Tars in place that are refused, have changed, or are read again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from helpers.blocks import whole
from helpers.pictures import WIDTH, encode
from helpers.tars import tar_of
from helpers.tars_in_place import ROWS, index_folder, members, reader_over, write_tars

from nev.config.base import ConfigError
from nev.config.data import Columns
from nev.data.index import build_index
from nev.data.prepare.filters import Filters
from nev.data.prepare.in_place import index_tars
from nev.data.prepare.pipeline import prepare
from nev.data.sidecar import missing_sidecars, sidecars_to_write
from nev.data.sources import SOURCES, SourceOptions, find_files
from nev.data.text_sidecar import sidecar_key, text_sidecars, write_sidecar
from nev.storage.files import list_files
from nev.storage.reading import DataError


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    return write_tars(tmp_path / "tars")


def test_a_second_call_reads_what_has_changed_alone(tars: Path) -> None:
    index_folder(tars)
    before = {name: (tars / "nev-index" / name).stat().st_mtime_ns for name in list_files(f"{tars}/nev-index")}
    tar_of(tars / "00001.tar", members(100, 6))
    tar_of(tars / "00003.tar", members(30))
    with pytest.raises(DataError, match=r"1 of its tars have no index, such as 00003\.tar\."):
        build_index(str(tars), Columns())
    with pytest.raises(DataError, match=r"00001\.tar: this tar has changed since it was indexed \([\d,]+ bytes then"):
        build_index(f"{tars}/{{00000..00002}}.tar", Columns())
    report = index_folder(tars)
    assert (report.counts["tars"], report.counts["tars read now"], report.rows_written) == (4, 2, 36)
    after = {name: (tars / "nev-index" / name).stat().st_mtime_ns for name in before}
    assert [name for name in before if after[name] != before[name]] == ["00001.parquet"]
    assert build_index(str(tars), Columns()).total_rows == 36


def test_an_interrupted_call_is_not_trained_on_and_continues(tars: Path) -> None:
    def stop_after_one(function: Any, items: Any, task_bytes: int) -> Any:
        yield function(items[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_folder(tars, run=stop_after_one)
    assert list_files(f"{tars}/nev-index") == ["00000.parquet", "_prepare/job.json"]
    with pytest.raises(DataError, match="not finished"):
        build_index(str(tars), Columns())
    assert index_folder(tars).counts["tars read now"] == 2
    assert build_index(str(tars), Columns()).total_rows == 30


def test_a_tar_of_the_same_size_with_another_time_is_refused(tars: Path) -> None:
    index_folder(tars)
    index = build_index(str(tars), Columns())
    os.utime(tars / "00002.tar", ns=(1, 1))
    with pytest.raises(DataError, match=r"00002\.tar: this tar has changed since it was indexed \(of the same size\)"):
        build_index(str(tars), Columns())
    with pytest.raises(DataError, match="Run the same `nev prepare --in-place` again"):
        reader_over(index).read(whole(index))
    (tars / "00002.tar").unlink()
    with pytest.raises(DataError, match=r"00002\.tar: this tar is gone since it was indexed"):
        build_index(str(tars), Columns())


def test_patterns_choose_tars_of_a_folder(tars: Path) -> None:
    with pytest.raises(DataError, match=r"3 of its tars have no index, such as 00000\.tar\. Index them: nev prepare"):
        build_index(str(tars), Columns())
    index_folder(tars)
    for pattern, first in (("{00001..00002}.tar", 10), ("0000[12].tar", 10), ("00002.tar", 20), ("*.tar", 0)):
        index = build_index(f"{tars}/{pattern}", Columns())
        assert reader_over(index).read(whole(index))["uid"][0] == f"row-{first}"
        assert len(index.paths) == (30 - first) // ROWS
    with pytest.raises(DataError, match=r"00003\.tar: no such tar"):
        build_index(f"{tars}/{{00000..00003}}.tar", Columns())
    with pytest.raises(DataError, match="only the name of a tar may be a pattern"):
        build_index(f"{tars.parent}/*/00000.tar", Columns())


def test_what_cannot_be_read_in_place_is_refused(tars: Path, tmp_path: Path) -> None:
    tar_of(tmp_path / "packed/a.tar.gz", members(0, 2), "w:gz")
    with pytest.raises(ConfigError, match=r"a\.tar\.gz: a compressed tar\. A picture in it cannot be read alone"):
        index_folder(tmp_path / "packed")
    tar_of(tmp_path / "disguised/a.tar", members(0, 2), "w:gz")
    with pytest.raises(ConfigError, match=r"a\.tar: not a whole tar file"):
        index_folder(tmp_path / "disguised")
    with pytest.raises(ConfigError, match="--dedupe compares the pictures of all tars"):
        index_folder(tars, filters=Filters(unique=True))
    index_folder(tars)
    with pytest.raises(ConfigError, match=r"00000\.parquet was made with other options.*--overwrite"):
        index_folder(tars, row_group_rows=8)
    assert index_folder(tars, row_group_rows=8, overwrite=True).counts["tars read now"] == 3
    (tars / "00002.tar").unlink()
    with pytest.raises(ConfigError, match=r"tars that are not in the input \(00002\.parquet, \.\.\.\)"):
        index_folder(tars, row_group_rows=8)
    assert index_folder(tars, row_group_rows=8, overwrite=True).rows_written == 20
    whole_tar = (tars / "00001.tar").read_bytes()
    (tars / "00001.tar").write_bytes(whole_tar[:5000])
    with pytest.raises(ConfigError, match=r"00001\.tar: not a whole tar file"):
        index_folder(tars, row_group_rows=8)


def test_a_folder_with_shards_is_left_alone(tars: Path, tmp_path: Path) -> None:
    prepare(SOURCES["webdataset"]([tars], SourceOptions()), tmp_path / "copied")
    with pytest.raises(ConfigError, match=r"holds other parquet files \(00000\.parquet"):
        index_folder(tars, f"{tmp_path}/copied", overwrite=True)


def test_vectors_of_former_captions_are_refused(tars: Path) -> None:
    """The captions of two rows change places: uids, rows and sizes stay the same."""
    index_folder(tars)
    index, key = build_index(str(tars), Columns()), sidecar_key("tower", "caption")
    for shard in missing_sidecars(text_sidecars(index, key, WIDTH)):
        write_sidecar(index, shard, key, WIDTH, encode)
    samples = members(0)
    samples["00002.txt"], samples["00003.txt"] = samples["00003.txt"], samples["00002.txt"]
    tar_of(tars / "00000.tar", samples)
    index_folder(tars)
    now = build_index(str(tars), Columns())
    assert sidecars_to_write(text_sidecars(now, key, WIDTH)) == [0]
    assert now.fingerprint != index.fingerprint


def test_a_tar_without_an_index_is_not_left_out_in_silence(tars: Path) -> None:
    index_folder(tars)
    tar_of(tars / "more/x.tar", members(70))
    tar_of(tars / "00003.tar", members(30))
    for root in (tars, tars / "*.tar"):
        with pytest.raises(DataError, match=r"of its tars have no index, such as 00003\.tar"):
            build_index(str(root), Columns())
    assert build_index(str(tars / "nev-index"), Columns()).total_rows == 30
    assert build_index(str(tars / "0000[0-2].tar"), Columns()).total_rows == 30
    report = index_folder(tars)  # a tar in a folder of its own, later: the names of the others stay
    assert (report.counts["tars read now"], report.rows_written) == (2, 50)
    assert build_index(str(tars), Columns()).total_rows == 50
    assert build_index(str(tars / "*.tar"), Columns()).total_rows == 40, "a pattern is of one folder"


def test_a_name_that_training_leaves_out_is_refused(tars: Path) -> None:
    tar_of(tars / "_own.tar", members(90))
    with pytest.raises(ConfigError, match=r"_own\.tar: a name that begins with '_' or '\.' is left out of training"):
        index_tars(find_files([tars / "*.tar"], (".tar",)), f"{tars}/nev-index", SourceOptions())


def test_places_without_their_tar_are_refused(tars: Path) -> None:
    index_folder(tars)
    file = tars / "nev-index/00001.parquet"
    pq.write_table(pq.read_table(file).replace_schema_metadata(None), file)
    with pytest.raises(
        DataError, match=r"00001\.parquet: has places of pictures in a tar, and its metadata name no tar"
    ):
        build_index(str(tars), Columns())


def test_an_index_further_down_is_not_a_set_of_shards(tars: Path) -> None:
    index_folder(tars)
    tar_of(tars.parent / "other/x.tar", members(50))
    with pytest.raises(DataError, match=r"4 of its tars have no index"):
        build_index(str(tars.parent), Columns())


def test_an_index_by_another_version_is_refused(tars: Path) -> None:
    index_folder(tars)
    file = tars / "nev-index/00000.parquet"
    table = pq.read_table(file)
    entries = json.loads(table.schema.metadata[b"nev.tar"])
    del entries["digest"]
    pq.write_table(table.replace_schema_metadata({b"nev.tar": json.dumps(entries)}), file)
    with pytest.raises(DataError, match=r"00000\.parquet: the index of a tar by another version"):
        build_index(str(tars), Columns())

"""Tars that are trained on where they lie: the rows of the tars, the contracts of the plan, and what is refused."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.blocks import equal, reader_of, whole
from helpers.pictures import WIDTH, encode, encoded, photo
from helpers.s3_server import Proxy
from helpers.tars import tar_of

from nev.config.base import ConfigError
from nev.config.data import Columns, Limits
from nev.data.block import BlockReader
from nev.data.index import Index, build_index
from nev.data.plan import Plan, choose_window
from nev.data.prepare.filters import Filters
from nev.data.prepare.in_place import index_tars
from nev.data.prepare.pipeline import PrepareReport, prepare
from nev.data.sidecar import missing_sidecars, sidecars_to_write
from nev.data.sources import SOURCES, SourceOptions, find_files
from nev.data.text_sidecar import sidecar_key, text_sidecars, write_sidecar
from nev.storage.files import filesystem, list_files
from nev.storage.reading import DataError

GROUP = 4
ROWS = 10  # of a tar


def members(first: int, count: int = ROWS) -> dict[str, Any]:
    """Samples as img2dataset writes them; the second one has several captions, in its JSON."""
    samples: dict[str, Any] = {}
    for number in range(first, first + count):
        key = f"{number:05d}"
        samples[f"{key}.jpg"] = encoded(photo(number))
        samples[f"{key}.txt"] = f"picture {number}"
        captions = {"captions": [f"picture {number}", "another"]} if number % ROWS == 1 else {}
        samples[f"{key}.json"] = {"uid": f"row-{number}", "score": number / 100, "status": "success", **captions}
    return samples


def write_tars(folder: Path, count: int = 3) -> Path:
    for number in range(count):
        tar_of(folder / f"{number:05d}.tar", members(ROWS * number))
    return folder


def index_folder(folder: str | Path, output: str | None = None, **more: Any) -> PrepareReport:
    settings = {"row_group_rows": GROUP, **more}
    options = settings.pop("options", SourceOptions())
    return index_tars(find_files([folder], (".tar", ".tar.gz")), output or f"{folder}/nev-index", options, **settings)


def reader_over(index: Index, **more: Any) -> BlockReader:
    return BlockReader(index, 16, Limits(), 3, None, **more)


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    return write_tars(tmp_path / "tars")


def test_the_rows_are_those_that_prepare_would_copy(tars: Path, tmp_path: Path) -> None:
    report = index_folder(tars)
    assert (report.rows_in, report.rows_written, report.dropped) == (30, 30, {})
    assert {name: report.counts[name] for name in ("tars", "tars read now", "uids in several tars")} == {
        "tars": 3,
        "tars read now": 3,
        "uids in several tars": 0,
    }
    prepare(SOURCES["webdataset"]([tars], SourceOptions()), tmp_path / "copied")
    index, copied = build_index(str(tars), Columns()), build_index(str(tmp_path / "copied"), Columns())
    assert index.rows.tolist() == 3 * [4, 4, 2]
    blocks = [reader_over(each).read(whole(each)) for each in (index, copied)]
    rows = [dict(zip(block["uid"], block["image"], strict=True)) for block in blocks]
    assert rows[0].keys() == rows[1].keys()
    assert all(np.array_equal(rows[0][uid], rows[1][uid]) for uid in rows[0])
    assert blocks[0]["uid"].tolist() == [f"row-{number}" for number in range(30)]  # in the order of the tars
    captions = [pq.read_table(index.location(shard))["caption"].to_pylist() for shard in range(3)]
    assert captions[0][:2] == [["picture 0"], ["picture 1", "another"]]
    assert not (tars / "nev-index" / "_prepare").exists()
    assert Path(report.samples).read_bytes().startswith(b"\x89PNG")


def test_texts_are_embedded_beside_the_index_and_blocks_follow_the_plan(tars: Path) -> None:
    index_folder(tars)
    index = build_index(str(tars), Columns())
    key = sidecar_key("tower", "caption")
    for shard in missing_sidecars(text_sidecars(index, key, WIDTH)):
        write_sidecar(index, shard, key, WIDTH, encode)
    reader = reader_of(index, text_key=key)
    plan = Plan(index.rows, 3, 6, 3, choose_window(index.rows, 3))
    rows = reader.read(whole(index, epoch=1))
    at = {uid: row for row, uid in enumerate(rows["uid"])}
    taken = []
    for number in range(plan.blocks_per_epoch, 2 * plan.blocks_per_epoch):
        block = next(reader.read_blocks(plan.make_window(number)))
        places = [at[uid] for uid in block["uid"]]
        assert equal(block, {name: column[places] for name, column in rows.items()})
        taken += places
    assert sorted(taken) == list(range(30))
    assert rows["text"].any(axis=1).all()


def test_the_pictures_of_a_row_group_are_one_range(s3: Proxy, tars: Path) -> None:
    """From S3: one GET of the tar for each row group, and no other request while training."""
    fs, path = filesystem("s3://bucket/tars")
    for tar in sorted(tars.glob("*.tar")):
        fs.pipe_file(f"{path}/{tar.name}", tar.read_bytes())
    report = index_folder("s3://bucket/tars")
    assert report.rows_written == 30
    index = build_index("s3://bucket/tars", Columns())
    index_folder(tars)
    expected = reader_over(build_index(str(tars), Columns())).read(whole(index))
    s3.reset()
    assert equal(reader_over(index).read(whole(index)), expected)
    assert s3.count("GET", ".tar") == len(index.rows)
    assert s3.count("HEAD", ".tar") == 0
    # A tar that is replaced while a process has it open is refused by its ETag.
    reader = reader_over(index)
    first = whole(index)[:1]
    reader.read(first)
    fs.pipe_file(f"{path}/00000.tar", tar_of(tars / "other.tar", members(500)).read_bytes())
    with pytest.raises(
        DataError, match=r"s3://bucket/tars/00000\.tar cannot be read .*replaced meanwhile: start again"
    ):
        reader.read(first)
    with pytest.raises(DataError, match=r"00000\.tar: this tar has changed since it was indexed"):
        build_index("s3://bucket/tars", Columns())


def test_members_far_apart_are_read_one_by_one(tmp_path: Path) -> None:
    """What a filter leaves out between two pictures is read over only where it is small."""
    from nev.data import tars as module

    large = {"00001.jpg": encoded(photo(1)), "00001.txt": "one", "00002.npy": bytes(3 * module.GAP_BYTES)}
    tar_of(tmp_path / "tars/a.tar", large | {"00003.jpg": encoded(photo(3)), "00003.txt": "three"})
    report = index_folder(tmp_path / "tars")
    assert report.dropped == {"not read: .npy": 1}
    assert report.counts["bytes read over"] == 0
    index = build_index(str(tmp_path / "tars"), Columns())
    assert index.nbytes[0] < module.GAP_BYTES  # a task reads no more
    reads: list[int] = []

    class Counting:
        def __init__(self, source: Any) -> None:
            self.source = source

        def seek(self, place: int) -> None:
            self.source.seek(place)

        def read_buffer(self, nbytes: int) -> Any:
            reads.append(nbytes)
            return self.source.read_buffer(nbytes)

    import pyarrow as pa

    tar, places = index.tars[0], pq.read_table(index.location(0))["image"]
    assert tar
    source: Any = Counting(pa.memory_map(tar.location))
    pictures = module.read_pictures(source, tar, places)
    assert [picture.to_pybytes() for picture in pictures] == [encoded(photo(1)), encoded(photo(3))]
    assert sum(reads) == sum(map(len, (encoded(photo(1)), encoded(photo(3)))))


def test_filters_apply_when_tars_are_indexed(tars: Path, tmp_path: Path) -> None:
    (tmp_path / "uids.txt").write_text("".join(f"row-{number}\n" for number in range(5, 25)))
    options = SourceOptions(score="score")
    filters = Filters(uids=tmp_path / "uids.txt", score="score", min_score=0.08)
    report = index_folder(tars, options=options, filters=filters)
    assert report.rows_written == 17
    assert report.dropped == {"uid not in the list": 10, "score below 0.08": 3}
    index = build_index(str(tars), Columns())
    assert reader_over(index).read(whole(index))["uid"].tolist() == [f"row-{number}" for number in range(8, 25)]
    named = index_folder(tars, f"{tmp_path}/named", options=SourceOptions(columns=Columns(caption="txt")))
    assert named.rows_written == 30
    assert pq.read_table(tmp_path / "named/00000.parquet")["caption"].to_pylist()[1] == "picture 1"


def test_bad_pictures_stay_as_masked_rows_and_bad_samples_are_counted(tmp_path: Path) -> None:
    samples = members(0, 4)
    samples["00001.jpg"] = samples["00001.jpg"][:150]
    samples["00002.txt"] = ""
    samples |= {"00002.json": {}, "00009.jpg": encoded(photo(9)), "00009.txt": "again", "00009.json": {"uid": "row-0"}}
    tar_of(tmp_path / "tars/a.tar", samples)
    report = index_folder(tmp_path / "tars")
    assert report.dropped == {"empty caption": 1, "duplicate uid": 1}
    index = build_index(str(tmp_path / "tars"), Columns())
    block = reader_over(index).read(whole(index))
    assert block["uid"].tolist() == ["row-0", "row-1", "row-3"]
    assert block["valid"].tolist() == [True, False, True]
    assert "truncated" in block["reason"][1].lower()


def test_uids_of_several_tars_are_counted_and_stay(tmp_path: Path) -> None:
    for name in ("a", "b"):
        tar_of(tmp_path / f"tars/{name}.tar", members(0, 3))
    report = index_folder(tmp_path / "tars")
    assert (report.rows_written, report.counts["uids in several tars"]) == (6, 3)
    apart = index_folder(tmp_path / "tars", f"{tmp_path}/apart", options=SourceOptions(tar_in_uid=True))
    assert (apart.rows_written, apart.counts["uids in several tars"]) == (6, 0)


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


def test_index_and_tars_may_move_together(tars: Path, tmp_path: Path) -> None:
    index_folder(tars)
    expected = reader_over(build_index(str(tars), Columns()))
    block = expected.read(whole(expected.index))
    moved = tars.rename(tmp_path / "moved")
    index = build_index(str(moved), Columns())
    assert equal(reader_over(index).read(whole(index)), block)
    assert index.fingerprint == expected.index.fingerprint


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


def test_parquet_beside_the_tars_is_not_taken_for_shards(tars: Path) -> None:
    import pyarrow as pa

    pq.write_table(pa.table({"key": ["00000"], "url": ["x"]}), tars / "00000.parquet")  # as img2dataset leaves it
    index_folder(tars)
    assert build_index(str(tars), Columns()).total_rows == 30


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


def test_sparse_members_have_no_place(tmp_path: Path) -> None:
    """A GNU sparse member leaves out its zeros, so its bytes in the tar are not the file."""
    picture = encoded(photo(1))
    info = tarfile.TarInfo("00001.jpg")
    info.size = len(picture)
    info.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.map": f"0,{len(picture)}",
        "GNU.sparse.size": str(len(picture)),
    }
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(picture))
        for name, content in {**members(2, 2), "00001.txt": "sparse"}.items():
            raw = json.dumps(content).encode() if isinstance(content, dict) else content
            raw = raw.encode() if isinstance(raw, str) else raw
            plain = tarfile.TarInfo(name)
            plain.size = len(raw)
            tar.addfile(plain, io.BytesIO(raw))
    report = index_folder(tmp_path / "tars")
    assert report.rows_written == 2
    assert report.rows_in == report.rows_written + sum(report.dropped.values())


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


def test_tars_beside_shards_are_none_of_their_business(tars: Path, tmp_path: Path) -> None:
    for name in ("shards", "set.tar"):
        prepare(SOURCES["webdataset"]([tars], SourceOptions()), tmp_path / name)
        tar_of(tmp_path / name / "backup.tar", members(0))
        assert build_index(str(tmp_path / name), Columns()).total_rows == 30


def test_the_folder_and_its_index_are_one_set(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index_folder(tars)
    index = build_index(str(tars), Columns())
    monkeypatch.chdir(tars.parent)
    for root in (f"{tars}/nev-index", f"{tars}/*.tar", "tars", "tars/nev-index"):
        other = build_index(root, Columns())
        assert (other.root, other.paths, other.fingerprint, other.tars) == (
            index.root,
            index.paths,
            index.fingerprint,
            index.tars,
        )


def test_a_new_class_is_added_to_the_names(tmp_path: Path) -> None:
    def labelled(name: str, labels: list[int]) -> None:
        samples: dict[str, Any] = {}
        for label in labels:
            samples |= {f"{name}{label}.jpg": encoded(photo(label)), f"{name}{label}.txt": "text"}
            samples[f"{name}{label}.json"] = {"label": label, "label_name": f"class {label}", "uid": f"{name}{label}"}
        tar_of(tmp_path / f"tars/{name}.tar", samples)

    labelled("a", [0, 1])
    index_folder(tmp_path / "tars")
    assert (tmp_path / "tars/classes.txt").read_text() == "class 0\nclass 1\n"
    labelled("b", [1, 2])
    report = index_folder(tmp_path / "tars")
    assert report.classes == f"{tmp_path}/tars/classes.txt"
    assert (tmp_path / "tars/classes.txt").read_text() == "class 0\nclass 1\nclass 2\n"
    index = build_index(str(tmp_path / "tars"), Columns())
    assert reader_over(index, with_labels=True).read(whole(index))["label"].tolist() == [0, 1, 1, 2]


def test_places_without_their_tar_are_refused(tars: Path) -> None:
    index_folder(tars)
    file = tars / "nev-index/00001.parquet"
    pq.write_table(pq.read_table(file).replace_schema_metadata(None), file)
    with pytest.raises(
        DataError, match=r"00001\.parquet: has places of pictures in a tar, and its metadata name no tar"
    ):
        build_index(str(tars), Columns())


def test_a_tar_of_which_no_row_is_usable(tars: Path) -> None:
    tar_of(tars / "00003.tar", {"1.jpg": encoded(photo(1)), "1.txt": ""})
    report = index_folder(tars)
    assert (report.rows_written, report.dropped) == (30, {"empty caption": 1})
    assert build_index(str(tars), Columns()).total_rows == 30


def test_tars_of_two_places(tmp_path: Path) -> None:
    tar_of(tmp_path / "a/x.tar", members(0))
    tar_of(tmp_path / "c/_y.TAR", members(20))
    files = find_files([tmp_path / "a", tmp_path / "c/_y.TAR"], (".tar",))
    with pytest.raises(ConfigError, match=r"_y\.TAR: a name that begins"):
        index_tars(files, f"{tmp_path}/index", SourceOptions())
    (tmp_path / "c/_y.TAR").rename(tmp_path / "c/y.TAR")
    files = find_files([tmp_path / "a", tmp_path / "c"], (".tar",))
    assert index_tars(files, f"{tmp_path}/index", SourceOptions()).rows_written == 20
    assert build_index(f"{tmp_path}/index", Columns()).paths == ("a/x.parquet", "c/y.parquet")


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


def test_files_beside_the_tars_are_counted_without_the_indexes(tars: Path) -> None:
    from nev.commands.prepare import leave_out_indexes

    index_folder(tars)
    assert leave_out_indexes({".parquet": 5, ".md": 1}, f"{tars}/nev-index", [str(tars)]) == {".parquet": 2, ".md": 1}
    assert leave_out_indexes({".parquet": 3}, f"{tars}/nev-index", [str(tars)]) == {}
    assert leave_out_indexes({".md": 1}, f"{tars.parent}/elsewhere", [str(tars)]) == {".md": 1}

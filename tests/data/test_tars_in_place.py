"""Tars that are trained on where they lie: the rows of the tars, the contracts of the plan, and what is refused."""

from __future__ import annotations

import io
import json
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
from helpers.tars_in_place import index_folder, members, reader_over, write_tars

from nev.config.base import ConfigError
from nev.config.data import Columns
from nev.data.index import build_index
from nev.data.plan import Plan, choose_window
from nev.data.prepare.filters import Filters
from nev.data.prepare.in_place import index_tars
from nev.data.prepare.pipeline import prepare
from nev.data.sidecar import missing_sidecars
from nev.data.sources import SOURCES, SourceOptions, find_files
from nev.data.text_sidecar import sidecar_key, text_sidecars, write_sidecar
from nev.storage.files import filesystem
from nev.storage.reading import DataError


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


def test_index_and_tars_may_move_together(tars: Path, tmp_path: Path) -> None:
    index_folder(tars)
    expected = reader_over(build_index(str(tars), Columns()))
    block = expected.read(whole(expected.index))
    moved = tars.rename(tmp_path / "moved")
    index = build_index(str(moved), Columns())
    assert equal(reader_over(index).read(whole(index)), block)
    assert index.fingerprint == expected.index.fingerprint


def test_parquet_beside_the_tars_is_not_taken_for_shards(tars: Path) -> None:
    import pyarrow as pa

    pq.write_table(pa.table({"key": ["00000"], "url": ["x"]}), tars / "00000.parquet")  # as img2dataset leaves it
    index_folder(tars)
    assert build_index(str(tars), Columns()).total_rows == 30


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


def test_files_beside_the_tars_are_counted_without_the_indexes(tars: Path) -> None:
    from nev.commands.prepare import leave_out_indexes

    index_folder(tars)
    assert leave_out_indexes({".parquet": 5, ".md": 1}, f"{tars}/nev-index", [str(tars)]) == {".parquet": 2, ".md": 1}
    assert leave_out_indexes({".parquet": 3}, f"{tars}/nev-index", [str(tars)]) == {}
    assert leave_out_indexes({".md": 1}, f"{tars.parent}/elsewhere", [str(tars)]) == {".md": 1}

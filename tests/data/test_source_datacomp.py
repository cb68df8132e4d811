"""DataComp: tars joined by uid with their metadata."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.sources import read
from helpers.tars import tar_of

from nev.config.base import ConfigError
from nev.config.data import Columns
from nev.data.sources import SourceOptions

A, B, C, D = (digit * 32 for digit in "abcd")


def members(*uids: str) -> dict[str, bytes | str | dict[str, str]]:
    out: dict[str, bytes | str | dict[str, str]] = {}
    for number, uid in enumerate(uids):
        facts = {"uid": uid, "caption": "of the tar", "status": "success", "sim": "0"}
        out |= {f"{number:09d}.jpg": uid[:1].encode(), f"{number:09d}.json": facts, f"{number:09d}.txt": "of the tar"}
    return out


def metadata(path: Path, **columns: list[object]) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def test_the_metadata_give_caption_and_score(tmp_path: Path) -> None:
    tar_of(tmp_path / "tars/0.tar", members(A, D, C))
    tar_of(tmp_path / "tars/1.tar", members(B))
    metadata(tmp_path / "meta/0.parquet", uid=[C, A], text=["see", None], sim=[0.3, 0.1], url=["", ""])
    metadata(tmp_path / "meta/1.parquet", uid=[B, None, C], text=["bee", "nobody", "again"], sim=[None, 0.0, 0.9])
    options = SourceOptions(metadata=(str(tmp_path / "meta"),), score="sim")
    found = list(read("datacomp", [tmp_path / "tars"], options))
    assert [(row["uid"], row["image"], row["caption"], row.get("score"), row.get("reject")) for row in found] == [
        (A, b"a", None, 0.1, None),
        (D, b"d", "of the tar", None, "uid not in the metadata"),
        (C, b"c", "see", 0.3, None),
        (B, b"b", "bee", None, None),
    ]


def test_a_sample_that_failed_stays_rejected(tmp_path: Path) -> None:
    tar_of(tmp_path / "0.tar", {**members(A), "x.json": {"uid": B, "status": "failed_to_resize"}})
    options = SourceOptions(metadata=(str(metadata(tmp_path / "m.parquet", uid=[A], text=["a"])),))
    assert [row.get("reject") for row in read("datacomp", [tmp_path], options)] == [None, "status failed_to_resize"]


def test_a_caption_that_is_not_utf8_concerns_its_row_alone(tmp_path: Path) -> None:
    tar_of(tmp_path / "0.tar", members(A, B))
    texts = pa.array([b"caf\xe9", b"bee"]).view(pa.string())
    file = tmp_path / "m.parquet"
    pq.write_table(pa.table({"uid": [A, B], "text": texts}), file)
    found = [
        (row["caption"], row.get("reject"))
        for row in read("datacomp", [tmp_path / "0.tar"], SourceOptions(metadata=(str(file),)))
    ]
    assert found == [("of the tar", "caption not in UTF-8"), ("bee", None)]


def test_of_metadata_with_one_uid_the_first_counts(tmp_path: Path) -> None:
    tar_of(tmp_path / "0.tar", members(A, B))
    uids, texts = [A, B] * 500, [f"{at}" for at in range(1000)]
    options = SourceOptions(metadata=(str(metadata(tmp_path / "m.parquet", uid=uids, text=texts)),))
    assert [row["caption"] for row in read("datacomp", [tmp_path], options)] == ["0", "1"]


def test_a_uid_that_is_no_text_is_not_in_the_metadata(tmp_path: Path) -> None:
    tar_of(tmp_path / "0.tar", {"x.jpg": b"x", "x.json": '{"uid": "\\ud83d"}'})
    options = SourceOptions(metadata=(str(metadata(tmp_path / "m.parquet", uid=[A], text=["a"])),))
    assert [row.get("reject") for row in read("datacomp", [tmp_path], options)] == ["uid not in the metadata"]


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"id": [A], "text": ["a"]}, {}, r"m\.parquet: no uid column 'uid' \(columns: \['id', 'text'\]\)"),
        ({"uid": [A], "alt": ["a"]}, {}, r"m\.parquet: no caption column 'text' or 'caption'"),
        ({"uid": [A], "text": ["a"]}, {"columns": Columns(caption="alt")}, r"m\.parquet: no caption column 'alt'"),
        ({"uid": [A], "text": ["a"]}, {"score": "sim"}, r"m\.parquet: no score column 'sim'"),
        ({"uid": [A], "text": ["a"], "sim": ["1"]}, {"score": "sim"}, "column 'sim' cannot be the score: it is string"),
        ({"uid": [1], "text": ["a"]}, {}, "column 'uid' cannot be the uid: it is int64"),
    ],
)
def test_metadata_without_a_column_are_refused(
    tmp_path: Path, columns: dict[str, list[object]], options: dict[str, object], message: str
) -> None:
    tar_of(tmp_path / "0.tar", members(A))
    file = metadata(tmp_path / "m.parquet", **columns)
    with pytest.raises(ConfigError, match=message):
        next(read("datacomp", [tmp_path], SourceOptions.model_validate({"metadata": [str(file)], **options})))


def test_missing_or_broken_metadata_are_named(tmp_path: Path) -> None:
    tar_of(tmp_path / "0.tar", members(A))
    with pytest.raises(ConfigError, match=r"needs its metadata parquet \(--metadata\)"):
        next(read("datacomp", [tmp_path], SourceOptions()))
    (tmp_path / "m.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ConfigError, match=r"m\.parquet: not readable as metadata parquet"):
        next(read("datacomp", [tmp_path], SourceOptions(metadata=(str(tmp_path / "m.parquet"),))))
    empty = metadata(tmp_path / "e.parquet", uid=pa.array([], pa.string()), text=pa.array([], pa.string()))
    with pytest.raises(ConfigError, match=r"e\.parquet: the metadata have no rows"):
        next(read("datacomp", [tmp_path], SourceOptions(metadata=(str(empty),))))


def test_real_tars_with_metadata_for_half_of_them(data_folder: Path, tmp_path: Path) -> None:
    plain = list(read("webdataset", [data_folder / "flickr8k/dev"], SourceOptions()))
    half = plain[::-2]
    texts = [f"about {row['uid']}" for row in half]
    file = metadata(tmp_path / "m.parquet", uid=[row["uid"] for row in half], text=texts, sim=[0.5] * len(half))
    options = SourceOptions(metadata=(str(file),), score="sim")
    joined = list(read("datacomp", [data_folder / "flickr8k/dev"], options))
    assert [row["image"] for row in joined] == [row["image"] for row in plain]
    assert [row.get("reject") for row in joined] == ["uid not in the metadata", None] * 500
    assert all(row["caption"] == f"about {row['uid']}" and row.get("score") == 0.5 for row in joined[1::2])

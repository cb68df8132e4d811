"""Readers of Hugging Face parquet, and how inputs are found: good input, bad rows, bad files, real data."""

import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.sources import read

from nev.config.base import ConfigError
from nev.config.data import Columns
from nev.data.sources import SOURCES, SourceOptions, find_files

REAL = os.environ.get("NEV_DATA")
needs_data = pytest.mark.skipif(not REAL, reason="NEV_DATA does not name the folder of real data")
DEFAULT = SourceOptions()
LABELLED = SourceOptions(templates=("a {}",))


def parquet_of(path: Path, metadata: dict[str, str] | None = None, **columns: Any) -> Path:
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
    return path


IMAGES = pa.array([{"bytes": b"one", "path": "1.png"}, {"bytes": b"two", "path": None}, None])


def test_hf_parquet_recognises_the_usual_columns(tmp_path: Path) -> None:
    parquet_of(tmp_path / "part.parquet", image=IMAGES, text=["a", "", None])
    rows = list(read("hf-parquet", [tmp_path], DEFAULT))
    assert [row.pop("source") for row in rows] == [f"{tmp_path}/part.parquet/{number}" for number in range(3)]
    assert rows == [
        {"uid": "part-00000000", "image": b"one", "caption": "a", "label": None, "label_name": None},
        {"uid": "part-00000001", "image": b"two", "caption": "", "label": None, "label_name": None},
        {"uid": "part-00000002", "image": None, "caption": None, "label": None, "label_name": None},
    ]


def test_parquet_of_img2dataset_has_a_status(tmp_path: Path) -> None:
    file = parquet_of(
        tmp_path / "00000.parquet",
        key=["000000000", "000000001"],
        jpg=[b"one", None],
        caption=["a", "b"],
        status=["success", "failed_to_download"],
        similarity=[0.25, None],
    )
    found = list(read("hf-parquet", [file], SourceOptions(score="similarity")))
    assert [(row["uid"], row["image"], row.get("reject"), row.get("score")) for row in found] == [
        ("000000000", b"one", None, 0.25),
        ("000000001", None, "status failed_to_download", None),
    ]
    numbers = parquet_of(tmp_path / "own.parquet", image=[b"x"], text=["t"], status=[3])
    assert "reject" not in next(read("hf-parquet", [numbers], DEFAULT))


def test_text_that_is_called_class_is_no_label(tmp_path: Path) -> None:
    text = parquet_of(tmp_path / "a.parquet", jpeg=[b"x"], txt=["t"], **{"class": ["cat"]}, labels=[3])
    assert next(read("hf-parquet", [text], DEFAULT)).get("label") == 3


def test_hf_parquet_takes_named_columns(tmp_path: Path) -> None:
    file = parquet_of(tmp_path / "x.parquet", nr=[5, 6], pic=[b"5", b"6"], said=[["a", "b"], ["c"]], text=["no", "no"])
    options = SourceOptions(columns=Columns(uid="nr", image="pic", caption="said"))
    assert [(row["uid"], row["image"], row["caption"]) for row in read("hf-parquet", [file], options)] == [
        ("5", b"5", ["a", "b"]),
        ("6", b"6", ["c"]),
    ]


def test_hf_parquet_fills_templates_with_the_class_name(tmp_path: Path) -> None:
    file = parquet_of(tmp_path / "x.parquet", image=IMAGES, label=[0, 1, 0], label_name=["traffic_light", "{}", None])
    options = SourceOptions(templates=("a photo of a {}.", "the {}"))
    found = list(read("hf-parquet", [file], options))
    assert [row["caption"] for row in found] == [
        ["a photo of a traffic light.", "the traffic light"],
        ["a photo of a {}.", "the {}"],
        None,
    ]
    assert [row.get("label_name") for row in found] == ["traffic_light", "{}", None]


def test_hf_parquet_finds_class_names_in_the_metadata(tmp_path: Path) -> None:
    features = json.dumps({"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}})
    file = parquet_of(tmp_path / "x.parquet", {"huggingface": features}, image=IMAGES, label=[1, 0, -1])
    found = list(read("hf-parquet", [file], SourceOptions(templates=("a {}",))))
    named = [(row.get("label_name"), row["caption"]) for row in found]
    assert named == [("dog", ["a dog"]), ("cat", ["a cat"]), (None, None)]


def test_hf_parquet_gives_files_of_one_name_different_uids(tmp_path: Path) -> None:
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        parquet_of(tmp_path / part / "0.parquet", image=[b"x"], text=["t"])
    assert [row["uid"] for row in read("hf-parquet", [tmp_path], DEFAULT)] == ["a/0-00000000", "b/0-00000000"]


def test_relative_and_absolute_inputs_may_be_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("a", "b"):
        (tmp_path / part / "cat").mkdir(parents=True)
        (tmp_path / part / "cat/0.jpg").write_bytes(b"x")
        (tmp_path / part / "t.csv").write_text("file_name,caption\ncat/0.jpg,x\n")
        parquet_of(tmp_path / part / "0.parquet", image=[b"x"], text=["t"])
    monkeypatch.chdir(tmp_path / "a")
    for kind, names in (
        ("hf-parquet", {"a/0-00000000", "b/0-00000000"}),
        ("folder-captions", {"a/cat/0.jpg", "b/cat/0.jpg"}),
        ("folder-classes", {"a/cat/0.jpg", "b/cat/0.jpg"}),
    ):
        for inputs in ([".", tmp_path / "b"], ["../a", "../b"], [tmp_path / "a", tmp_path / "b"]):
            found = list(read(kind, inputs, LABELLED if kind == "folder-classes" else DEFAULT))
            assert {row["uid"] for row in found} == names
            assert all(row["image"] == b"x" for row in found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            SourceOptions(columns=Columns(image="pixels")),
            r"x\.parquet: no column 'pixels' \(columns: \['image', ",
        ),
        (DEFAULT, r"x\.parquet: no caption column .*--caption, or make captions from class names with --template"),
        (SourceOptions(templates=("a {}",)), r"x\.parquet: templates need class names"),
        (SourceOptions(columns=Columns(caption="label")), "column 'label' cannot be the caption: it is int64"),
        (
            SourceOptions(columns=Columns(image="label", caption="label")),
            "column 'label' cannot be the image: it is int64",
        ),
        (SourceOptions(columns=Columns(caption="label"), templates=("a {}",)), "or templates, not both"),
    ],
)
def test_hf_parquet_names_the_column_that_is_wrong(tmp_path: Path, options: SourceOptions, message: str) -> None:
    file = parquet_of(tmp_path / "x.parquet", image=IMAGES, label=[0, 1, 0])
    with pytest.raises(ConfigError, match=message):
        list(read("hf-parquet", [file], options))


def test_hf_parquet_names_a_file_that_is_not_readable(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ConfigError, match=r"x\.parquet: not readable as parquet"):
        list(read("hf-parquet", [tmp_path], DEFAULT))


def test_a_template_without_a_slot_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a template needs exactly one"):
        SourceOptions(templates=("a photo",))


def test_a_link_to_a_folder_is_refused(tmp_path: Path) -> None:
    for name in ("set/a.tar", "other/b.tar"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    (tmp_path / "set/more").symlink_to(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"set/more: a link to a folder, which is not followed"):
        find_files([tmp_path / "set"], (".tar",))
    assert len(find_files([tmp_path / "set/more"], (".tar",))) == 1


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in/closed").mkdir(parents=True)
    (tmp_path / "in/a.tar").touch()
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ConfigError, match=r"in/closed: this folder cannot be listed \(Permission denied\)"):
        find_files([tmp_path / "in"], (".tar",))


def test_inputs_are_files_folders_or_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b/2.tar", "a/1.tar", "a/notes.txt", "_cache/3.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    both = [str(tmp_path / "a/1.tar"), str(tmp_path / "b/2.tar")]
    assert [file.location for file in find_files([tmp_path], (".tar",))] == both
    found = find_files([f"{tmp_path}/[ab]/*.tar", tmp_path / "b/2.tar"], (".tar",))
    assert [file.location for file in found] == both
    monkeypatch.chdir(tmp_path / "a")
    assert [file.location for file in find_files(["../b/*.tar"], (".tar",))] == both[1:]


@pytest.mark.parametrize("kind", SOURCES)
def test_inputs_that_give_nothing_are_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ConfigError, match="needs at least one input"):
        list(read(kind, [], LABELLED))
    with pytest.raises(ConfigError, match=r"no such file or folder"):
        list(read(kind, [tmp_path / "nowhere"], LABELLED))
    with pytest.raises(ConfigError, match=r"\(it holds: nothing\)"):
        list(read(kind, [tmp_path], LABELLED))
    (tmp_path / "a.doc").touch()
    with pytest.raises(ConfigError, match=r"\(it holds: \.doc\)"):
        list(read(kind, [tmp_path], LABELLED))


@needs_data
def test_flickr8k_dev_has_five_captions_a_picture() -> None:
    assert REAL
    found = list(read("webdataset", [Path(REAL) / "flickr8k/dev"], DEFAULT))
    assert len({row["uid"] for row in found}) == len(found) == 1000
    assert {len(row["caption"] or ()) for row in found} == {5}
    assert all((row["image"] or b"").startswith(b"\xff\xd8") and "reject" not in row for row in found)


@needs_data
def test_cifar10_is_labelled() -> None:
    assert REAL
    options = SourceOptions(templates=("a photo of a {}.",))
    found = list(islice(read("hf-parquet", [f"{REAL}/cifar10/test-*.parquet"], options), 500))
    assert {row.get("label") for row in found} == set(range(10))
    assert all(row["caption"] == [f"a photo of a {row.get('label_name')}."] for row in found)
    assert all((row["image"] or b"").startswith(b"\xff\xd8") for row in found)

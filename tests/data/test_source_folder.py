"""Folders of pictures: captions in a table, or a folder a class; and nothing from outside the folder."""

import json
from collections import Counter
from pathlib import Path

import pytest
from helpers.sources import read

from nev.config.base import ConfigError
from nev.config.data import Columns, Limits
from nev.data.sources import SourceOptions

LABELLED = SourceOptions(templates=("a photo of a {}.", "the {}"))


def files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", 'filename,caption\na.jpg,"one, two"\nsub/b.PNG,three\n\na.jpg,four\n'),
        ("t.csv", "filepath\ttitle\na.jpg\tone, two\nsub/b.PNG\tthree\na.jpg\tfour\n"),  # as open_clip has it
        ("t.csv", "file;caption\na.jpg;one, two\nsub/b.PNG;three\na.jpg;four\n"),  # Excel's, in Europe
        ("t.tsv", "\ufeffpath\tn\ttext\r\na.jpg\t1\tone, two\r\nsub/b.PNG\t2\tthree\r\na.jpg\t3\tfour\r\n"),
        ("t.jsonl", '{"image": "a.jpg", "text": ["one, two", "four"]}\n\n{"image": "sub/b.PNG", "text": "three"}\n'),
    ],
)
def test_lines_for_one_file_are_its_captions(tmp_path: Path, name: str, text: str) -> None:
    files(tmp_path, "a.jpg", "sub/b.PNG", "unnamed.jpg")
    (tmp_path / name).write_text(text, encoding="utf-8")
    expected = [
        {"uid": "a.jpg", "image": b"a.jpg", "caption": ["one, two", "four"], "source": f"{tmp_path}/a.jpg"},
        {"uid": "sub/b.PNG", "image": b"sub/b.PNG", "caption": ["three"], "source": f"{tmp_path}/sub/b.PNG"},
    ]
    assert list(read("folder-captions", [tmp_path], SourceOptions())) == expected
    assert list(read("folder-captions", [tmp_path / name], SourceOptions())) == expected


def test_tables_of_several_folders_give_different_uids(tmp_path: Path) -> None:
    for part in ("x", "y"):
        files(tmp_path, f"{part}/a.jpg")
        (tmp_path / part / "metadata.csv").write_text("pic,said\na.jpg,hello\n")
    options = SourceOptions(columns=Columns(image="pic", caption="said"))
    assert [row["uid"] for row in read("folder-captions", [tmp_path], options)] == ["x/a.jpg", "y/a.jpg"]


def test_a_file_outside_the_folder_is_rejected(tmp_path: Path) -> None:
    files(tmp_path, "secret.jpg", "in/good.jpg", "in/sub/x.jpg", "in/large.jpg", "in/notes.txt")
    (tmp_path / "in/large.jpg").write_bytes(b"x" * 101)
    (tmp_path / "in/out.jpg").symlink_to(tmp_path / "secret.jpg")
    (tmp_path / "in/loop.jpg").symlink_to(tmp_path / "in/loop.jpg")
    (tmp_path / "in/link.jpg").symlink_to("good.jpg")
    names = ["good.jpg", "sub/../good.jpg", "link.jpg", "../secret.jpg", str(tmp_path / "secret.jpg"), "out.jpg"]
    names += ["gone.jpg", "sub", "notes.txt", "large.jpg", "nul\0.jpg", "loop.jpg"]
    lines = [json.dumps({"path": name, "text": "t"}) for name in names]
    (tmp_path / "in/t.jsonl").write_text("\n".join(lines))
    found = list(read("folder-captions", [tmp_path / "in"], SourceOptions(limits=Limits(max_bytes=100))))
    assert all((row["image"] is None) == ("reject" in row) for row in found)
    reasons = [row.get("reject") for row in found]
    assert reasons[:-1] == [
        None,
        None,
        None,
        *["path leads out of the folder"] * 3,
        "no such file",
        *["not an image file"] * 2,
        "image over 100 bytes",
        "file not readable",
    ]
    assert reasons[-1] in ("file not readable", "no such file")  # a link to itself: depends on Python's version


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "t.csv",
            b"name,caption\na.jpg,x\n",
            r"t\.csv: no column of files 'file_name' or .*columns: \['name', 'caption'\]",
        ),
        ("t.csv", b"file_name,words\na.jpg,x\n", r"t\.csv: no column of captions 'caption' or "),
        ("t.csv", b"file_name,caption\n", r"t\.csv: no line names a picture"),
        ("t.csv", b"", r"t\.csv: no line names a picture"),
        ("t.csv", b"file_name,caption\n,x\n", r"t\.csv:2: no file name in column 'file_name'"),
        ("t.csv", b"file_name,caption\na.jpg,caf\xe9\n", r"t\.csv: not in UTF-8 \(byte 0xe9"),
        ("t.jsonl", b'{"path": "a.jpg", "text": "x"}\n{"path"\n', r"t\.jsonl:2: not JSON"),
        ("t.jsonl", b"[1]\n", r"t\.jsonl:1: a JSON object is needed, not list"),
    ],
)
def test_a_bad_table_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        list(read("folder-captions", [tmp_path], SourceOptions()))


def test_a_line_without_caption_is_left_to_the_rule_for_all_rows(tmp_path: Path) -> None:
    files(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "t.csv").write_text("caption,path\n,a.jpg\n")
    assert [row["caption"] for row in read("folder-captions", [tmp_path], SourceOptions())] == [[""]]


def test_a_folder_is_a_class(tmp_path: Path) -> None:
    files(tmp_path, "sea_lion/1.JPG", "sea_lion/deep/2.webp", "ant/1.tiff", "ant/notes.txt", "_own/1.jpg", "top.gif")
    rows = list(read("folder-classes", [tmp_path], LABELLED))
    assert [row.pop("source") for row in rows] == [f"{tmp_path}/{row['uid']}" for row in rows]
    assert rows == [
        {
            "uid": "ant/1.tiff",
            "image": b"ant/1.tiff",
            "caption": ["a photo of a ant.", "the ant"],
            "label": 0,
            "label_name": "ant",
        },
        {
            "uid": "sea_lion/1.JPG",
            "image": b"sea_lion/1.JPG",
            "caption": ["a photo of a sea lion.", "the sea lion"],
            "label": 1,
            "label_name": "sea_lion",
        },
        {
            "uid": "sea_lion/deep/2.webp",
            "image": b"sea_lion/deep/2.webp",
            "caption": ["a photo of a sea lion.", "the sea lion"],
            "label": 1,
            "label_name": "sea_lion",
        },
        {"uid": "top.gif", "image": None, "caption": None, "reject": "not in the folder of a class"},
    ]


def test_folders_share_their_classes(tmp_path: Path) -> None:
    files(tmp_path, "x/b/1.jpg", "y/a/1.jpg", "y/b/1.jpg")
    found = [
        (row["uid"], row.get("label")) for row in read("folder-classes", [tmp_path / "y", tmp_path / "x"], LABELLED)
    ]
    assert found == [("x/b/1.jpg", 1), ("y/a/1.jpg", 0), ("y/b/1.jpg", 1)]


def test_a_link_out_of_the_folder_of_classes_is_rejected(tmp_path: Path) -> None:
    files(tmp_path, "secret.jpg", "in/a/1.jpg")
    (tmp_path / "in/a/2.jpg").symlink_to(tmp_path / "secret.jpg")
    assert [row.get("reject") for row in read("folder-classes", [tmp_path / "in"], LABELLED)] == [
        None,
        "path leads out of the folder",
    ]


def test_what_is_no_folder_of_classes_is_refused(tmp_path: Path) -> None:
    files(tmp_path, "flat/1.jpg", "holed/a/1.jpg", "holed/b/notes.txt", "file.jpg")
    for folder, message in (
        ("flat", r"flat: no sub-folder with pictures, one for each class \(it holds: \.jpg\)"),
        ("holed", r"holed/b: a class without pictures"),
        ("file.jpg", r"file\.jpg: this is a file"),
    ):
        with pytest.raises(ConfigError, match=message):
            list(read("folder-classes", [tmp_path / folder], LABELLED))
    with pytest.raises(ConfigError, match="a folder of classes has no captions: make them with --template"):
        list(read("folder-classes", [tmp_path / "holed"], SourceOptions()))


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("satellite", ["cloudy", "desert", "green_area", "water"]),
        ("brain_mri", ["glioma_tumor", "meningioma_tumor", "no_tumor", "pituitary_tumor"]),
    ],
)
def test_real_folders_of_classes(data_folder: Path, name: str, classes: list[str]) -> None:
    found = list(read("folder-classes", [data_folder / name], LABELLED))
    assert len({row["uid"] for row in found}) == len(found) == sum(1 for _ in (data_folder / name).rglob("*.jpg"))
    assert all(row["image"] and row.get("label_name") == classes[row.get("label") or 0] for row in found)
    assert set(Counter(row.get("label") for row in found)) == set(range(len(classes)))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('file,caption\na.jpg,"one\nb.jpg,two\n', r"0\.csv: not readable as a table .*a quote inside a caption"),
        ('file\tcaption\na.jpg\t"to be\nb.jpg\ttwo\n', r"0\.csv: not readable as a table"),
        ("file,caption\na.jpg,A dog, running, fast\n", r"0\.csv:2: 4 cells, and 2 in the first line"),
    ],
)
def test_a_table_that_would_lose_words_or_lines_is_refused(tmp_path: Path, table: str, message: str) -> None:
    (tmp_path / "0.csv").write_text(table)
    with pytest.raises(ConfigError, match=message):
        list(read("folder-captions", [tmp_path / "0.csv"], SourceOptions()))


def test_captions_of_one_picture_in_two_tables_are_all_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"A")
    (tmp_path / "0.csv").write_text("file,caption\na.jpg,one\n./a.jpg,two\n")
    (tmp_path / "1.csv").write_text("file,caption\na.jpg,three\n")
    (found,) = read("folder-captions", [tmp_path], SourceOptions())
    assert (found["uid"], found["caption"]) == ("a.jpg", ["one", "two", "three"])

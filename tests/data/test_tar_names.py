"""Names in tars as people have them: dots in keys, other extensions, members apart, latin-1. Nothing is lost without a count."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from helpers.pictures import encoded, photo
from helpers.sources import read
from helpers.tars import tar_of
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from nev.commands.main import app
from nev.config.data import Columns
from nev.data.sources import SourceOptions
from nev.data.sources.samples import IMAGES, Member, find_faults, group_members, split_name

DEFAULT = SourceOptions()
APART = "apart from its picture: sort the tar by name"


def keys_of(tar: Path, options: SourceOptions = DEFAULT) -> dict[str, str]:
    """The uids of a tar, and why rows are rejected."""
    rows = list(read("webdataset", [tar], options))
    uids = {row["uid"]: row.get("reject", "") for row in rows}
    assert len(uids) == len(rows)
    return uids


def test_a_key_ends_before_the_last_dot(tmp_path: Path) -> None:
    keys = ["photo.v1", "photo.v2", "22.05", "a.b.c.d", "dir.x/e", "dir.x/e.f", "plain"]
    members: dict[str, bytes | str] = {}
    for key in keys:
        members |= {f"{key}.jpg": key.encode(), f"{key}.txt": f"of {key}", f"{key}.cls": "3"}
    tar = tar_of(tmp_path / "0.tar", members)
    rows = list(read("webdataset", [tar], DEFAULT))
    assert [(row["uid"], row["image"], row["caption"], row["label"]) for row in rows] == [
        (key, key.encode(), f"of {key}", 3) for key in keys
    ]


@pytest.mark.parametrize("extension", IMAGES)
def test_pictures_of_every_known_extension_are_read(extension: str, tmp_path: Path) -> None:
    tar = tar_of(
        tmp_path / "0.tar", {f"a.{extension}": b"A", "a.txt": "a", f"b.c.{extension.upper()}": b"B", "b.c.txt": "b"}
    )
    assert keys_of(tar) == {"a": "", "b.c": ""}


@pytest.mark.parametrize(
    "names",
    [
        ("x.jpg", "x.json", "x.left.png"),
        ("x.left.png", "x.jpg", "x.json"),
        ("x.left.png", "x.right.png", "x.txt", "x.jpg"),
    ],
)
def test_a_second_picture_of_a_sample_is_ambiguous_and_counted(names: tuple[str, ...], tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "0.tar", {name: "{}" if "json" in name else b"P" for name in names})
    for captioned in (True, False):
        uids = keys_of(tar, SourceOptions(captioned=captioned))
        assert uids.pop("x") == ""
        assert uids
        assert all(reason.startswith("ambiguous key") for reason in uids.values())


def test_pictures_alone_are_not_ambiguous(tmp_path: Path) -> None:
    names = ["cat.1.jpg", "cat.2.jpg", "cat.jpg", *(f"dog.{n}.png" for n in range(40))]
    tar = tar_of(tmp_path / "0.tar", dict.fromkeys(names, b"P"))
    assert set(keys_of(tar, SourceOptions(captioned=False)).values()) == {""}


def test_of_two_pictures_of_a_key_the_usual_one_counts(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "0.tar", {"a.bmp": b"mask", "a.gif": b"small", "a.jpg": b"A", "a.txt": "a"})
    rows = list(read("webdataset", [tar], DEFAULT))
    assert (rows[0]["uid"], rows[0]["image"]) == ("a", b"A")
    assert [row["reject"] for row in rows[1:]] == ["another picture of its sample"] * 2


def test_links_are_counted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"A"))
        for name, kind in (("b.jpg", tarfile.LNKTYPE), ("c.jpg", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "a.jpg"
            tar.addfile(link)
    reasons = [row.get("reject") for row in read("webdataset", [tmp_path / "0.tar"], DEFAULT)]
    assert reasons == [None, "not read: .link", "not read: .link"]


def test_every_member_of_an_unknown_extension_is_counted(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "0.tar", {f"./IMG.{n}.HEIC": b"H" for n in range(40)})
    assert keys_of(tar) == {f"./IMG.{n}": "not read: .heic" for n in range(40)}
    members = {"./README": b"r", "v1.0/abc": b"r", "a.x.npy": b"1", "a.y.npy": b"2", "a.y.jpg": b"A"}
    assert keys_of(tar_of(tmp_path / "1.tar", members)) == {
        "./README": "not read", "v1.0/abc": "not read", "a.x": "not read: .npy", "a.y": ""
    }  # fmt: skip


def test_members_of_other_extensions_are_of_the_sample_that_they_continue(tmp_path: Path) -> None:
    members = {
        "a.npy": b"1",
        "a.jpg": b"A",
        "a.txt": "a",
        "a.clip.npy": b"2",
        "b.v2.bin": b"3",
        "b.v2.jpg": b"B",
        "b.v2.txt": "b",
    }
    assert keys_of(tar_of(tmp_path / "0.tar", members)) == {"a": "", "b.v2": ""}
    others = {
        "c.mp4": b"C",
        "c.wav": b"C",
        "d.jpg": b"D",
        "d.txt": "d",
        "e.heic": b"E",
        "e.txt": "e",
        "README": b"hello",
    }
    assert keys_of(tar_of(tmp_path / "1.tar", others)) == {
        "c": "not read: .wav", "d": "", "e": "no image member", "README": "not read",
    }  # fmt: skip


def test_members_that_are_apart_say_so(tmp_path: Path) -> None:
    pictures = {f"{n}.jpg": b"P" for n in range(3)}
    texts = {f"{n}.txt": "t" for n in range(3)}
    rows = list(read("webdataset", [tar_of(tmp_path / "0.tar", pictures | texts)], DEFAULT))
    assert Counter(row.get("reject", "") for row in rows) == {"": 3, APART: 3}
    rows = list(read("webdataset", [tar_of(tmp_path / "1.tar", texts | pictures)], DEFAULT))
    reasons = Counter(row.get("reject", "") for row in rows)
    assert reasons == {"no image member": 3, "apart from its text: sort the tar by name": 3}
    uncaptioned = SourceOptions(captioned=False)
    rows = list(read("webdataset", [tar_of(tmp_path / "2.tar", texts | pictures)], uncaptioned))
    assert Counter(row.get("reject", "") for row in rows) == {"no image member": 3, "": 3}


def test_names_in_latin_1_are_escaped(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, content in (("café.jpg", b"P"), ("café.txt", b"a caf\xc3\xa9")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (row,) = read("webdataset", [tmp_path / "0.tar"], DEFAULT)
    assert (row["uid"], row["caption"]) == (r"caf\xe9", "a café")


@pytest.mark.parametrize(
    ("column", "caption"), [(None, "alt"), ("txt", "text"), ("recaption", "new"), ("several", ["1", "2"]), ("none", "")]
)
def test_the_caption_is_what_the_user_names(column: str | None, caption: str | list[str], tmp_path: Path) -> None:
    record = {"caption": "alt", "recaption": "new", "several": ["1", "2"]}
    tar = tar_of(tmp_path / "0.tar", {"a.jpg": b"A", "a.json": record, "a.txt": "text"})
    (row,) = read("webdataset", [tar], SourceOptions(columns=Columns(caption=column)))
    assert row["caption"] == caption


def test_compressed_tars_are_read_and_others_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, (suffix, mode) in enumerate(
        (("tar", "w"), ("TAR", "w"), ("tar.bz2", "w:bz2"), ("tar.xz", "w:xz"), ("tgz", "w:gz"))
    ):
        picture = encoded(photo(number))
        tar_of(tmp_path / f"in/{number}.{suffix}", {f"{number}.jpg": picture, f"{number}.txt": "a caption"}, mode)
    (tmp_path / "in/5.tar.zst").write_bytes(b"zst")
    (tmp_path / "in/stats.json").write_bytes(b"{}")
    shown = CliRunner().invoke(
        app, ["prepare", "--source", "webdataset", "--input", "in", "--output", "out/train"], catch_exceptions=False
    )
    rows = {
        cells[0]: cells[1] for line in shown.output.splitlines() if len(cells := line.strip("│ ").split(" │ ")) == 2
    }
    counts = {name.strip(): count.strip() for name, count in rows.items()}
    assert counts["rows in"] == counts["kept"] == "5"
    assert counts["files not read: .tar.zst"] == counts["files not read: .json"] == "1"


NAMES = st.lists(
    st.tuples(
        st.sampled_from(["a", "a.b", "b", "d/a", "d/a.b"]),
        st.sampled_from(["jpg", "txt", "json", "png", "npy", "x.jpg", "y.npy"]),
    ),
    max_size=12,
)


@given(NAMES)
def test_no_member_of_a_known_extension_is_lost(names: list[tuple[str, str]]) -> None:
    known = sorted({*IMAGES, "txt", "json"}, key=len, reverse=True)
    members = [Member(*split_name(f"{key}.{extension}", known), b"") for key, extension in names]
    samples = list(find_faults(group_members(members), captioned=True))
    grouped = [(sample.key, extension) for sample in samples for extension in sample.parts]
    assert grouped == [(name, extension) for name, extension, _, _ in members if extension]
    assert all(sample.fault for sample in samples if not sample.parts)
    keys = {sample.key for sample in samples}
    for name, extension, _, _ in members:
        assert extension or any(name == key or name.startswith(f"{key}.") for key in keys), "each belongs to a row"

"""The reader of WebDataset tars: good input, bad samples, bad files."""

import io
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.sources import read
from helpers.tars import tar_of

from nev.config.base import ConfigError
from nev.config.data import Limits
from nev.data.rows import usable_rows
from nev.data.sources import SourceOptions

DEFAULT = SourceOptions()


def test_webdataset_takes_uid_captions_and_label_where_they_are(tmp_path: Path) -> None:
    tar = tar_of(
        tmp_path / "00000.tar",
        {
            "a.jpg": b"A",
            "a.txt": "first",
            "a.json": {"uid": "u1", "caption": "first", "captions": ["first", None, "second"], "status": "success"},
            "b.PNG": b"B",
            "b.json": {"caption": "only", "label": 2, "label_name": "ship"},
            "dir/e.jpeg": b"E",
            "dir/e.txt": "text",
            "dir/e.cls": "7",
            "f.jpg": b"F",
            "f.cls": "sea lion\n",
            "g.jpg": b"G",
            "g.json": {"caption": "y", "label": "cat"},
        },
    )
    rows = list(read("webdataset", [tar], DEFAULT))
    files = ["a.jpg", "b.png", "dir/e.jpeg", "f.jpg", "g.jpg"]
    assert [row.pop("source") for row in rows] == [f"{tar}/{file}" for file in files]
    content = tar.read_bytes()
    assert all(content[row.pop("offset") :].startswith(row["image"]) for row in rows)
    assert rows == [
        {"uid": "u1", "image": b"A", "caption": ["first", "second"], "label": None, "label_name": None},
        {"uid": "b", "image": b"B", "caption": "only", "label": 2, "label_name": "ship"},
        {"uid": "dir/e", "image": b"E", "caption": "text", "label": 7, "label_name": None},
        {"uid": "f", "image": b"F", "caption": "", "label": None, "label_name": "sea lion"},
        {"uid": "g", "image": b"G", "caption": "y", "label": None, "label_name": "cat"},
    ]


def test_webdataset_keys_that_repeat_from_tar_to_tar_are_told_apart_by_the_tars(tmp_path: Path) -> None:
    for tar in ("a/0.tar", "a/1.tar", "b/0.tar"):
        tar_of(tmp_path / tar, {"x.jpg": tar.encode(), "x.txt": "one", "y.jpg": b"Y", "y.json": {"uid": "own"}})
    found = list(read("webdataset", [tmp_path], SourceOptions(tar_in_uid=True)))
    assert [row["uid"] for row in found] == [
        f"{tar}/{key}" for tar in ("a/0.tar", "a/1.tar", "b/0.tar") for key in ("x", "own")
    ]
    assert {row["uid"] for row in read("webdataset", [tmp_path], DEFAULT)} == {"x", "own"}


def test_webdataset_tells_neighbours_of_one_key_apart(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in (("a.jpg", b"1"), ("a.txt", b"one"), ("a.jpg", b"2"), ("a.cls", b""), ("a.txt", b"two")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    found = [
        (row["uid"], row["image"], row["caption"], row.get("label_name"))
        for row in read("webdataset", [tmp_path], DEFAULT)
    ]
    assert found == [("a", b"1", "one", None), ("a", b"2", "two", None)]


def test_webdataset_counts_a_tar_without_a_sample(tmp_path: Path) -> None:
    tar_of(tmp_path / "0.tar", {})
    tar_of(tmp_path / "1.tar", {".hidden.jpg": b"no member that is used"})
    tar_of(tmp_path / "2.tar", {"a.jpg": b"A", "a.txt": "text"})
    tar_of(tmp_path / "3.tar", {"a.txt": "text"})
    found = [row.get("reject") for row in read("webdataset", [tmp_path], DEFAULT)]
    assert found == [*["tar without a picture, KEY.jpg or another"] * 2, None, "no image member"]


def test_webdataset_reads_no_text_past_its_limit(tmp_path: Path) -> None:
    tar_of(tmp_path / "0.tar", {"a.jpg": b"A", "a.txt": "x" * 2**20, "b.jpg": b"B", "b.txt": "x" * (2**20 + 1)})
    assert [row.get("reject") for row in read("webdataset", [tmp_path], DEFAULT)] == [
        None,
        "member over its size limit",
    ]


def test_webdataset_takes_the_score_from_the_json(tmp_path: Path) -> None:
    members: dict[str, Any] = {}
    for key, facts in (("a", {"sim": 0.3}), ("b", {"sim": None}), ("c", {}), ("d", {"sim": "high"})):
        members |= {f"{key}.jpg": b"x", f"{key}.json": {"caption": "x", **facts}}
    found = list(read("webdataset", [tar_of(tmp_path / "0.tar", members)], SourceOptions(score="sim")))
    assert [row.get("score") for row in found] == [0.3, None, None, None]
    assert [row.get("reject") for row in found] == [None, None, None, "unreadable json, txt or cls"]


def test_webdataset_rejects_bad_samples_with_a_reason(tmp_path: Path) -> None:
    tar_of(
        tmp_path / "0.tar",
        {
            "good.jpg": b"G",
            "good.txt": "fine",
            "failed.json": {"caption": "x", "status": "failed_to_download"},
            "lonely.txt": "no picture",
            "broken.jpg": b"B",
            "broken.json": "{",
            "list.jpg": b"L",
            "list.json": "[1]",
            "latin.jpg": b"L",
            "latin.txt": "caf\xe9".encode("latin-1"),
            "large.jpg": b"L" * 101,
            "large.txt": "too large",
        },
    )
    found = list(read("webdataset", [tmp_path], SourceOptions(limits=Limits(max_bytes=100))))
    assert {row["uid"]: row.get("reject") for row in found} == {
        "good": None,
        "failed": "status failed_to_download",
        "lonely": "no image member",
        "broken": "unreadable json, txt or cls",
        "list": "unreadable json, txt or cls",
        "latin": "unreadable json, txt or cls",
        "large": "member over its size limit",
    }


@pytest.mark.parametrize(
    "facts",
    [
        '{"caption": 5}',
        '{"caption": {"en": "x"}}',
        '{"captions": ["x", 5]}',
        '{"caption": "x", "label": 1e999}',
        '{"caption": "x", "label": 9223372036854775808}',
        '{"caption": "x", "label": ["cat"]}',
        '{"caption": "x", "label": 3.7}',
        '{"caption": "x", "label": true}',
        '{"caption": "x", "a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    ],
)
def test_webdataset_rejects_what_json_should_not_hold(tmp_path: Path, facts: str) -> None:
    tar = tar_of(tmp_path / "0.tar", {"a.jpg": b"A", "a.json": facts})
    assert [row.get("reject") for row in read("webdataset", [tar], DEFAULT)] == ["unreadable json, txt or cls"]


def test_half_an_emoji_is_counted_and_goes_no_further(tmp_path: Path) -> None:
    members = {
        "a.jpg": b"A",
        "a.json": '{"caption": "cut \\ud83d"}',
        "b.jpg": b"B",
        "b.json": '{"caption": "\\ud83d\\ude00"}',
    }
    dropped: Counter[str] = Counter()
    kept = usable_rows(read("webdataset", [tar_of(tmp_path / "0.tar", members)], DEFAULT), dropped, Limits())
    assert [row["caption"] for row in kept] == [["\U0001f600"]]
    assert dropped == {"uid, caption or class name with half a surrogate pair": 1}


def test_webdataset_looks_at_regular_members_only(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        link = tarfile.TarInfo("secret.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
        for name, content in (("../up.jpg", b"U"), ("../up.txt", b"up")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    rows = [(row["uid"], row["image"], row.get("reject")) for row in read("webdataset", [tmp_path], DEFAULT)]
    assert rows == [("secret.jpg", None, "not read: .link"), ("../up", b"U", None)]
    assert not (tmp_path.parent / "up.jpg").exists()


@pytest.mark.parametrize("at", [0.3, 0.5, 0.8])
def test_webdataset_names_a_tar_that_is_cut_off(tmp_path: Path, at: float) -> None:
    tar = tar_of(tmp_path / "0.tar", {f"{k}.{end}": b"x" * 2000 for k in range(20) for end in ("jpg", "txt")})
    whole = tar.read_bytes()
    tar.write_bytes(whole[: int(len(whole) * at)])
    with pytest.raises(ConfigError, match=r"0\.tar: not a whole tar file"):
        list(read("webdataset", [tar], DEFAULT))


def test_webdataset_names_a_tar_with_a_damaged_header(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "0.tar", {f"{k}.jpg": b"x" * 100 for k in range(5)})
    raw = bytearray(tar.read_bytes())
    raw[2 * 1024 + 100] ^= 0xFF  # in the header of the third member; tarfile alone would end there without a word
    tar.write_bytes(raw)
    with pytest.raises(
        ConfigError, match=r"0\.tar: not a whole tar file \(neither a header nor the end mark at byte 2048\)"
    ):
        list(read("webdataset", [tar], DEFAULT))


def test_webdataset_reads_gzip_and_refuses_what_is_no_image_tar(tmp_path: Path) -> None:
    packed = tar_of(tmp_path / "0.tar.gz", {"a.jpg": b"A", "a.txt": "text"}, "w:gz")
    assert [row["image"] for row in read("webdataset", [packed], DEFAULT)] == [b"A"]
    packed.write_bytes(packed.read_bytes()[:60])
    with pytest.raises(ConfigError, match=r"0\.tar\.gz: not a whole tar file"):
        list(read("webdataset", [packed], DEFAULT))
    text = tmp_path / "1.tar"
    text.write_text("this is no tar" * 100)
    with pytest.raises(ConfigError, match=r"1\.tar: not a whole tar file"):
        list(read("webdataset", [text], DEFAULT))

"""Folders of pictures without captions: read by path and by key, their parts, and how the kind of an input is recognised."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.s3_server import Proxy

from nev.config.base import ConfigError
from nev.data.sources import SOURCES, Part, SourceOptions
from nev.storage.files import filesystem


def test_a_picture_that_is_added_changes_its_part_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nev.data.sources.pictures.PART_PICTURES", 8)
    for k in range(200):
        (tmp_path / f"{k:03d}.png").write_bytes(b"x")

    def parts() -> list[Part]:
        return list(SOURCES["folder"]([tmp_path], SourceOptions()).parts)

    before = parts()
    assert 10 < len(before) < 50
    (tmp_path / "100a.png").write_bytes(b"y")
    after = parts()
    assert len({part.stamp for part in before} - {part.stamp for part in after}) == 1
    assert sum(len(part.content.names) for part in after) == 201


def test_pictures_in_folders_are_read_by_path(tmp_path: Path) -> None:
    for name in ("in/a.jpg", "in/sub/b.JPEG", "in/_own/c.jpg", "in/sub/n.txt", "other/d.webp", "out.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "in/link.png").symlink_to(tmp_path / "out.png")

    def read(*inputs: Path | str, **options: Any) -> list[tuple[str, bytes | None, str | None]]:
        source = SOURCES["folder"](inputs, SourceOptions(**options))
        rows = [row for part in source.parts for row in source.read(part.content)]
        return [(row["uid"], row["image"], row.get("reject")) for row in rows]

    assert read(tmp_path / "in") == [
        ("a.jpg", b"in/a.jpg", None),
        ("link.png", None, "path leads out of the folder"),
        ("sub/b.JPEG", b"in/sub/b.JPEG", None),
    ]
    assert [uid for uid, *_ in read(tmp_path / "in", tmp_path / "other")] == [
        "in/a.jpg", "in/link.png", "in/sub/b.JPEG", "other/d.webp",
    ]  # fmt: skip
    assert [uid for uid, *_ in read(f"{tmp_path}/in/s*/*.JPEG")] == ["sub/b.JPEG"]
    assert [uid for uid, *_ in read(tmp_path / "out.png")] == ["out.png"]
    assert read(tmp_path / "in/a.jpg", limits={"max_bytes": 3}) == [("a.jpg", None, "image over 3 bytes")]


def test_pictures_on_s3_are_read_by_key(s3: Proxy, tmp_path: Path) -> None:
    fs, _ = filesystem("s3://bucket/in")
    for name in ("in/a.jpg", "in/sub/b.png", "in/sub/large.png", "in/n.txt"):
        fs.pipe_file(f"bucket/{name}", name.encode() * (9 if "large" in name else 1))
    source = SOURCES["folder"](["s3://bucket/in"], SourceOptions(limits={"max_bytes": 50}))
    fs.rm_file("bucket/in/sub/b.png")
    (part,) = source.parts
    s3.reset()
    rows = [(row["uid"], row["image"], row.get("reject")) for row in source.read(part.content)]
    assert rows == [
        ("a.jpg", b"in/a.jpg", None),
        ("sub/b.png", None, "no such file"),
        ("sub/large.png", None, "image over 50 bytes"),
    ]
    assert s3.count("GET") <= 3  # none for the large picture
    s3.rule = lambda method, path, span, before: "403"
    with pytest.raises(ConfigError, match=r"s3://bucket/in/a\.jpg: not readable.*Access is denied"):
        list(source.read(part.content))


def test_the_kind_of_an_input_is_the_user_s_where_it_is_not_clear(tmp_path: Path) -> None:
    from nev.data.sources.recognise import recognise_source

    (tmp_path / "a.parquet").touch()
    (tmp_path / "a.png").touch()
    with pytest.raises(ConfigError, match=r"has parquet files and pictures\. Choose with --source"):
        recognise_source([tmp_path], metadata=False)
    assert recognise_source([f"{tmp_path}/*.parquet"], metadata=False) == ("hf-parquet", Counter())
    (tmp_path / "a.tgz").touch()
    assert recognise_source([tmp_path], metadata=False) == ("webdataset", Counter({".parquet": 1, ".png": 1}))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.doc").touch()
    with pytest.raises(ConfigError, match=r"no tars, no parquet, no pictures\. It holds \.doc \(1\)"):
        recognise_source([tmp_path / "docs"], metadata=False)

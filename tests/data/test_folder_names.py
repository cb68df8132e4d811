"""Folders of pictures under every name that a picture has; what is not read is counted in the report."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.pictures import encoded, photo
from helpers.sources import read
from typer.testing import CliRunner

from nev.commands.main import app
from nev.config.data import Limits
from nev.data.decode import decode
from nev.data.sources import SOURCES, SourceOptions
from nev.data.sources.samples import IMAGES

FORMATS = {"avif": "AVIF", "jp2": "JPEG2000", "ppm": "PPM", "bmp": "BMP", "gif": "GIF", "jfif": "JPEG", "tif": "TIFF"}


def write_pictures(folder: Path) -> None:
    for number, (suffix, form) in enumerate(FORMATS.items()):
        file = folder / ("cat" if number % 2 else "dog") / f"{number}.{suffix.upper() if number == 3 else suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(photo(number), form))


@pytest.mark.parametrize("kind", ["folder-classes", "folder"])
def test_pictures_of_every_format_are_read_and_others_counted(kind: str, tmp_path: Path) -> None:
    write_pictures(tmp_path)
    for name in ("cat/a.heic", "cat/b.jxl", "dog/c.heic", "notes.txt", "dog/LICENSE"):
        (tmp_path / name).write_bytes(b"other")
    options = SourceOptions(templates=("a {}",))
    rows = list(read(kind, [tmp_path], options))
    assert len(rows) == len(FORMATS)
    for row in rows:
        assert decode(row["image"] or b"", Limits()).shape == (20, 24, 3)
    assert SOURCES[kind]([tmp_path], options).unread == {".heic": 2, ".jxl": 1, ".txt": 1, "no suffix": 1}


def test_the_report_of_prepare_has_the_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "in")
    (tmp_path / "in/cat/x.heic").write_bytes(b"other")
    arguments = [
        "prepare",
        "--source",
        "folder-classes",
        "--input",
        "in",
        "--template",
        "a {}.",
        "--output",
        "out/train",
    ]
    shown = CliRunner().invoke(app, arguments, catch_exceptions=False).output
    assert re.search(rf"│ kept +│ +{len(FORMATS)} │", shown)
    assert re.search(r"│ files not read: \.heic +│ +1 │", shown)


def test_the_suffixes_are_those_of_formats_that_are_decoded() -> None:
    assert {"jpg", "jpeg", "png", "webp", *FORMATS} <= set(IMAGES)

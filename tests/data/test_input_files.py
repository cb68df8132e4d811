"""Inputs of `nev prepare` that are patterns with braces: every file that they name is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from nev.config.base import ConfigError
from nev.data.sources.input_files import find_files


def make_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def find(pattern: str) -> list[str]:
    return [file.location for file in find_files([pattern], (".tar",))]


def test_braces_name_files(tmp_path: Path) -> None:
    make_files(tmp_path, *(f"{number:05d}.tar" for number in range(5)), "x/a.tar", "y/a.tar", "z/a.tar")
    assert find(f"{tmp_path}/{{00001..00003}}.tar") == [f"{tmp_path}/{number:05d}.tar" for number in (1, 2, 3)]
    assert find(f"{tmp_path}/{{00004..00004}}.tar") == [f"{tmp_path}/00004.tar"]
    assert find(f"{tmp_path}/{{x,z}}/a.tar") == [f"{tmp_path}/x/a.tar", f"{tmp_path}/z/a.tar"]
    assert find(f"{tmp_path}/{{x,z}}/{{a,a}}.tar") == [f"{tmp_path}/x/a.tar", f"{tmp_path}/z/a.tar"], "each file once"
    assert find(f"{tmp_path}/{{x,z}}/*.tar") == [f"{tmp_path}/x/a.tar", f"{tmp_path}/z/a.tar"]
    assert find(f"{tmp_path}/{{x,z}}") == [f"{tmp_path}/x/a.tar", f"{tmp_path}/z/a.tar"], "folders"
    for nothing in ("{x,lost}/*.tar", "{x,lost}"):
        with pytest.raises(ConfigError, match=r"/lost.* matches nothing \(1 of 2 such names\)"):
            find(f"{tmp_path}/{nothing}")
    with pytest.raises(ConfigError, match=r"2 of 4 files are not there \(.*/00005\.tar\)"):
        find(f"{tmp_path}/{{00003..00006}}.tar")


def test_a_name_with_braces_is_a_name(tmp_path: Path) -> None:
    make_files(tmp_path, "{1..3}.tar")
    assert find(f"{tmp_path}/{{1..3}}.tar") == [f"{tmp_path}/{{1..3}}.tar"]


def test_braces_on_s3_are_one_listing(s3: object, tmp_path: Path) -> None:
    from nev.storage.files import filesystem

    fs, path = filesystem("s3://bucket/braces")
    for number in range(4):
        fs.pipe_file(f"{path}/{number:02d}.tar", b"x")
    assert find("s3://bucket/braces/{01..03}.tar") == [f"s3://bucket/braces/{number:02d}.tar" for number in (1, 2, 3)]
    with pytest.raises(ConfigError, match="1 of 3 files are not there"):
        find("s3://bucket/braces/{02..04}.tar")

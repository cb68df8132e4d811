"""Input files that are torn, joined, or bombs are named, and nothing of them passes for whole."""

import gzip
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.sources import read
from helpers.tars import tar_of

from nev.config.base import ConfigError
from nev.data.sources import SourceOptions

DEFAULT = SourceOptions()


@pytest.mark.parametrize("end", [".tar", ".tar.gz"])
def test_a_tar_whose_second_half_is_zeros_is_not_whole(tmp_path: Path, end: str) -> None:
    members = {f"{number}.{kind}": b"x" * 60_000 for number in range(40) for kind in ("jpg", "txt")}
    whole = tar_of(tmp_path / "whole.tar", members).read_bytes()
    at = whole.index(b"20.jpg")
    zeros = whole[:at] + bytes(len(whole) - at)
    joined = whole + whole
    for content in (zeros, joined):
        (tmp_path / f"0{end}").write_bytes(gzip.compress(content) if end.endswith("gz") else content)
        with pytest.raises(
            ConfigError, match=rf"0{end}: not a whole tar file \(the end mark at byte \d+ is not at the"
        ):
            list(read("webdataset", [tmp_path / f"0{end}"], DEFAULT))


def test_a_long_header_is_not_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.pax_headers = {"comment": "x" * 3_000_000}
        tar.addfile(info)
    with pytest.raises(ConfigError, match=r"0\.tar\.gz: not a whole tar file (.|\n)*a header of 3\d+ bytes"):
        list(read("webdataset", [tmp_path / "0.tar.gz"], DEFAULT))


def test_a_torn_gzip_names_its_file(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(tar_of(tmp_path / "0.tar", {"a.jpg": b"A" * 999, "a.txt": b"a"}).read_bytes()))
    for at in range(10, len(content)):
        torn = content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]
        (tmp_path / "1.tar.gz").write_bytes(torn)
        with pytest.raises(ConfigError, match=r"1\.tar\.gz: "):
            list(read("webdataset", [tmp_path / "1.tar.gz"], DEFAULT))


def test_parquet_text_that_is_not_utf8_names_its_file(tmp_path: Path) -> None:
    odd = pa.array([b"caf\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"image": [b"A"], "caption": odd}), tmp_path / "0.parquet")
    with pytest.raises(ConfigError, match=r"0\.parquet: not readable as parquet .*utf-8"):
        list(read("hf-parquet", [tmp_path / "0.parquet"], DEFAULT))


def test_an_empty_file_at_the_front_is_a_part(tmp_path: Path) -> None:
    (tmp_path / "0.tar").touch()
    tar_of(tmp_path / "1.tar", {"a.jpg": b"A", "a.txt": b"a"})
    with pytest.raises(ConfigError, match=r"0\.tar: not a whole tar file"):
        list(read("webdataset", [tmp_path], DEFAULT))

"""Files that are written whole or not at all, and copies that stay in their folder."""

import os
from pathlib import Path

import pytest
from helpers.s3_server import Proxy

from nev.storage.files import StorageError, atomic_file, local_copy, upload, whole_folder, write_atomic

REMOTE = "s3://bucket/set/train"


def test_a_file_in_a_folder_is_replaced_in_one_step_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "file"
    write_atomic(str(file), b"old")
    with file.open("rb") as reader:
        write_atomic(str(file), b"another")
        assert reader.read() == b"old"  # who reads it meanwhile reads one or the other, never a mixture

    def half() -> None:
        with atomic_file(str(file)) as partial:
            Path(partial).write_bytes(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        half()
    assert file.read_bytes() == b"another"
    assert list(file.parent.iterdir()) == [file]


def test_the_disk_has_a_file_before_its_name_and_then_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str]] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(handle: int) -> None:
        done.append(("sync", Path(f"/proc/self/fd/{handle}").resolve().name))
        fsync(handle)

    def noted_replace(self: Path, target: str) -> Path:
        done.append(("replace", self.name))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    write_atomic(str(tmp_path / "file"), b"content")
    assert done == [("sync", "file"), ("replace", "file"), ("sync", tmp_path.name)]


@pytest.mark.parametrize("place", ["new", "deep/new", "empty", "link", "dangling"])
def test_a_folder_comes_whole_or_not_at_all(place: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "linked")
    (tmp_path / "dangling").symlink_to(tmp_path / "later")
    before = sorted(tmp_path.rglob("*"))

    def half() -> None:
        with whole_folder(str(tmp_path / place), last="nev.json") as folder:
            (folder / "half").write_text("")
            raise KeyError

    with pytest.raises(KeyError):
        half()
    assert [path for path in sorted(tmp_path.rglob("*")) if path != tmp_path / "deep"] == before
    with whole_folder(str(tmp_path / place), last="nev.json") as folder:
        (folder / "text").mkdir()
        for name in ("nev.json", "text/model", "z"):
            (folder / name).write_text(name)
    assert {path.name for path in (tmp_path / place).iterdir()} == {"nev.json", "text", "z"}
    assert (tmp_path / place / "text" / "model").read_text() == "text/model"
    assert not list(tmp_path.rglob(".writing-*"))


def test_the_last_file_is_uploaded_last(tmp_path: Path, s3: Proxy) -> None:
    for name in ("a", "nev.json", "z"):
        (tmp_path / name).write_text(name)
    upload(tmp_path, "s3://bucket/export", last="nev.json")
    puts = [path for method, path in s3.seen if method == "PUT"]
    assert [path.rpartition("/")[2] for path in puts] == ["a", "z", "nev.json"]


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "a//b", "./a"])
def test_a_key_that_leads_out_of_its_folder_is_refused(
    name: str, s3: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("nev.storage.files.list_files", lambda location: [name])
    with pytest.raises(StorageError, match=r"leads out of its folder"), local_copy(REMOTE):
        pass
    assert s3.count("GET", "evil") == 0

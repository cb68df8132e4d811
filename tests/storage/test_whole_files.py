"""Files that are written whole or not at all, and copies that stay in their folder."""

import os
from pathlib import Path

import pytest
from helpers.s3_server import Proxy

from nev.storage.files import StorageError, atomic_file, local_copy, write_atomic

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


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "a//b", "./a"])
def test_a_key_that_leads_out_of_its_folder_is_refused(
    name: str, s3: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("nev.storage.files.list_files", lambda location: [name])
    with pytest.raises(StorageError, match=r"leads out of its folder"), local_copy(REMOTE):
        pass
    assert s3.count("GET", "evil") == 0

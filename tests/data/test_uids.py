"""Lists of uids: the files they come in, and that exactly the listed ones are found."""

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nev.config.base import ConfigError
from nev.data.uids import find_uid, hash_uids, read_uids

number = st.integers(0, 2**128 - 1) | st.integers(0, 2**64 - 1).map(lambda half: half << 64)  # trailing zero bytes, too


def as_npy(path: Path, uids: list[str]) -> Path:
    """A list as DataComp ships it: the two halves of each uid."""
    np.save(path, np.array([(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids], np.dtype("u8,u8")))
    return path


def as_parquet(path: Path, uids: list[str]) -> Path:
    pq.write_table(pa.table({"uid": uids}), path)
    return path


def as_txt(path: Path, uids: list[str]) -> Path:
    path.write_text("".join(f"{uid}\n" for uid in uids))
    return path


WRITERS = {".npy": as_npy, ".parquet": as_parquet, ".txt": as_txt}


@pytest.mark.parametrize("suffix", WRITERS)
@given(listed=st.sets(number, min_size=1, max_size=20), others=st.sets(number, max_size=20))
def test_exactly_the_listed_uids_are_found(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, listed: set[int], others: set[int]
) -> None:
    uids = [f"{value:032x}" for value in listed]
    keys = read_uids(WRITERS[suffix](tmp_path_factory.mktemp("uids") / f"list{suffix}", uids))
    assert all(find_uid(keys, uid) is not None for uid in uids)
    assert not any(find_uid(keys, f"{value:032x}") is not None for value in others - listed)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), min_size=1, unique=True))
def test_any_string_is_a_uid(uids: list[str]) -> None:
    assert len(set(hash_uids(uids).tolist())) == len(uids)
    keys = np.sort(hash_uids(uids))
    assert all(
        find_uid(keys, uid) is not None and find_uid(keys, f"{uid} ") is None for uid in uids if f"{uid} " not in uids
    )


def test_a_big_endian_list_is_read_by_its_numbers(tmp_path: Path) -> None:
    np.save(tmp_path / "list.npy", np.array([(1, 2)], np.dtype(">u8,>u8")))
    assert find_uid(read_uids(tmp_path / "list.npy"), f"{1:016x}{2:016x}") == 0


def test_a_line_of_text_is_a_uid_spaces_and_all(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes("\ufeffcat/my photo.jpg\r\n\r\nb\u2028c\nlast".encode())
    keys = read_uids(tmp_path / "list.txt")
    assert len(keys) == 3
    assert all(find_uid(keys, uid) is not None for uid in ("cat/my photo.jpg", "b\u2028c", "last"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.npy", np.arange(3), r"list\.npy: needs dtype 'u8,u8', .*; it is int64"),
        ("list.npy", np.array([{}], object), r"list\.npy: not readable as a list of uids"),
        ("list.npy", pickle.dumps([1]), r"list\.npy: not readable as a list of uids"),
        ("list.npy", b"PK\x03\x04", r"list\.npy: not readable as a list of uids"),
        ("list.npy", b"", r"list\.npy: not readable as a list of uids"),
        ("list.npy", np.empty(0, np.dtype("u8,u8")), r"list\.npy: this list of uids is empty"),
        ("list.parquet", b"PAR1", r"list\.parquet: not readable as a list of uids"),
        ("list.parquet", pa.table({"id": ["a"]}), r"list\.parquet: no column 'uid' \(columns: \['id'\]\)"),
        ("list.txt", b" \n", r"list\.txt: this list of uids is empty"),
        ("list.csv", b"a", r"list\.csv: a list of uids is a file \.npy, \.parquet, \.txt, not \.csv"),
        ("list.txt", None, r"list\.txt: not readable .*No such file"),
    ],
)
def test_a_bad_list_is_named(tmp_path: Path, name: str, content: object, message: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, pa.Table):
        pq.write_table(content, path)
    elif content is not None:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(ConfigError, match=message):
        read_uids(path)

"""uids as sorted 128-bit keys of 16 bytes: a list of a hundred million uids is an array of 1.6 GB.

DataComp and DFN name a pair by 32 hexadecimal digits, and ship their lists as .npy of dtype "u8,u8", the two halves of the number
(https://github.com/mlfoundations/datacomp). The key of any other uid is its blake2b hash of the same length. Keys are big-endian
bytes, which have the order of the numbers; NumPy sorts and searches bytes faster than records.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from nev.config.base import ConfigError

KEY = np.dtype("S16")
HEX = re.compile(r"[0-9a-f]{32}")
BATCH_ROWS = 65_536

Keys = NDArray[np.bytes_]


def hash_uid(uid: str) -> Keys:
    """The key of one uid: bytes [1]."""
    return hash_uids([uid])


def hash_uids(uids: list[str]) -> Keys:
    """The keys of `uids`, in their order: bytes [n]."""
    return np.frombuffer(bytearray().join(map(_key, uids)), KEY)


def _key(uid: str) -> bytes:
    if HEX.fullmatch(uid):
        return bytes.fromhex(uid)
    return hashlib.blake2b(uid.encode(errors="surrogatepass"), digest_size=16).digest()


def find_uid(keys: Keys, uid: str) -> int | None:
    """The first position of `uid` in the sorted `keys`, or None."""
    key = hash_uid(uid)
    position = int(np.searchsorted(keys, key)[0])
    return position if position < len(keys) and keys[position : position + 1] == key else None


def read_uids(path: Path) -> Keys:
    """Read a list of uids and return its sorted keys.

    path: .npy of dtype "u8,u8", .parquet with a column `uid`, or .txt with one uid a line.
    Raises ConfigError for a file that is missing, empty, or of another kind.
    """
    readers = {".npy": _npy, ".parquet": _parquet, ".txt": _txt}
    if path.suffix not in readers:
        raise ConfigError(
            f"{path}: a list of uids is a file {', '.join(readers)}, not {path.suffix or 'without suffix'}"
        )
    try:
        keys = readers[path.suffix](path)
    except (pa.ArrowException, OSError, ValueError, EOFError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not readable as a list of uids ({error})") from error
    if not len(keys):
        raise ConfigError(f"{path}: this list of uids is empty, so no row would be written")
    keys.sort()
    return keys


def _npy(path: Path) -> Keys:
    halves = np.lib.format.open_memmap(path, mode="r")  # reads no pickle, and needs no memory for the unsorted list
    if halves.dtype.names is None or [halves.dtype[name].kind for name in halves.dtype.names] != ["u", "u"]:
        raise ConfigError(f"{path}: needs dtype 'u8,u8', the two halves of each uid; it is {halves.dtype}")
    return np.ascontiguousarray(halves.astype(">u8,>u8")).reshape(-1).view(KEY)


def _parquet(path: Path) -> Keys:
    with pq.ParquetFile(path) as file:
        if "uid" not in file.schema_arrow.names:
            raise ConfigError(f"{path}: no column 'uid' (columns: {file.schema_arrow.names})")
        batches = [
            hash_uids([str(uid) for uid in batch.column(0).to_pylist() if uid is not None])
            for batch in file.iter_batches(BATCH_ROWS, columns=["uid"])
        ]
    return np.concatenate(batches) if batches else np.empty(0, KEY)


def _txt(path: Path) -> Keys:
    lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines also splits at characters that a uid may hold
    return hash_uids([line.rstrip("\r") for line in lines if line.strip()])

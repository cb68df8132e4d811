"""Vectors that are kept in files named after what they are of, so that nothing is embedded twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nev.data.sidecar import Encode
from nev.storage.files import join, write_atomic
from nev.storage.reading import read_bytes, write_errors_as_data_errors


def embed_texts_cached(sentences: Sequence[str], encode: Encode, fingerprint: str, cache: str) -> NDArray[np.float32]:
    """Sentences under a text tower of that fingerprint: unit float32 [n, D], embedded where `cache` lacks this list."""
    from safetensors.numpy import save

    file = join(cache, f"{hash_values(fingerprint, *sentences)}.safetensors")
    if (found := load_or_compute(file)) is not None:
        return found["vectors"]
    vectors = np.asarray(encode(sentences), np.float32)
    with write_errors_as_data_errors(file):
        write_atomic(file, save({"vectors": vectors}))
    return vectors


def load_or_compute(file: str) -> dict[str, NDArray[Any]] | None:
    """What a file of the cache holds; None where it is not there, or damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    data = read_bytes(file)
    try:
        return None if data is None else dict(load(data))
    except SafetensorError:
        return None


def hash_values(*parts: str) -> str:
    """The name of what these strings determine."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

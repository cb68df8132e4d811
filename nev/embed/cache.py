"""A cache of vectors: a file is named by a hash of what decides its vectors, so nothing is embedded twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nev.data.text_sidecar import Encode
from nev.storage.files import join, write_atomic
from nev.storage.reading import read_bytes, write_errors_as_data_errors


def embed_texts_cached(sentences: Sequence[str], encode: Encode, fingerprint: str, cache: str) -> NDArray[np.float32]:
    """Embed sentences, or read their vectors from the cache: float32 [n, D], rows of unit length.

    encode: sentences to vectors, by the text tower with this fingerprint.
    cache: folder or S3 prefix; one file holds the vectors of one list of sentences.
    Raises DataError where the cache cannot be read or written.
    """
    from safetensors.numpy import save

    file = join(cache, f"{hash_values(fingerprint, *sentences)}.safetensors")
    if (tensors := load_cached(file)) is not None:
        return tensors["vectors"]
    vectors = np.asarray(encode(sentences), np.float32)
    with write_errors_as_data_errors(file):
        write_atomic(file, save({"vectors": vectors}))
    return vectors


def load_cached(file: str) -> dict[str, NDArray[Any]] | None:
    """The tensors in a file of the cache; None where the file is absent or damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    data = read_bytes(file)
    try:
        return None if data is None else dict(load(data))
    except SafetensorError:
        return None


def hash_values(*parts: str) -> str:
    """A file name for what these strings decide: 32 hex digits of their sha256."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

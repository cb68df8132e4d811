"""Captions to token ids in the tasks that read them, for runs whose text tower is in the loop (`text.mode: online`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer


@dataclass(frozen=True)
class Tokens:
    """Sentences to int32 [n, width], -1 after the end of each. `tokenizer` cuts at `width`, special tokens included."""

    tokenizer: Tokenizer
    prefix: str
    width: int

    def __call__(self, sentences: Sequence[str]) -> NDArray[np.int32]:
        """Ids as the tower's own tokenizer gives them."""
        ids = np.full((len(sentences), self.width), -1, np.int32)
        for row, sentence in zip(ids, sentences, strict=True):
            found = self.tokenizer.encode(self.prefix + sentence).ids  # many at once would take every core
            row[: len(found)] = found
        return ids

"""Captions to token ids, in the decoding tasks, for runs with the text tower in the training loop (`text.mode: online`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer


@dataclass(frozen=True)
class CaptionTokenizer:
    """Sentences to token ids. Unlike the tower's tokenizer it needs no transformers, so tasks start fast.

    tokenizer: without padding; truncates to `width` tokens.
    prefix: text before every sentence.
    width: most tokens of a sentence, special tokens included.
    """

    tokenizer: Tokenizer
    prefix: str
    width: int

    def __call__(self, sentences: Sequence[str]) -> NDArray[np.int32]:
        """The ids that the tower's tokenizer gives: int32 [n, width], -1 after the end of a sentence."""
        ids = np.full((len(sentences), self.width), -1, np.int32)
        for row, sentence in zip(ids, sentences, strict=True):
            tokens = self.tokenizer.encode(self.prefix + sentence).ids  # a batch call would use every core
            row[: len(tokens)] = tokens
        return ids

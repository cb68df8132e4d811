"""Sentences to vectors, for a server: tokenised at once, and run in groups of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from nev.models.text import BATCH_TOKENS
from nev.ops.vectors import Floats
from nev.serve.engine import Sentence, TextVector

Ints = NDArray[np.int64]
Forward = Callable[[Ints, Ints], Floats]
# Tokens that a text may be padded by, beside its own length: below, a forward of its own would cost more than the padding does.
FREE_PADDING = 16


def make_text_encoder(
    tokenizer: Tokenizer, prompts: Mapping[str, str], forward: Forward
) -> Callable[[Sequence[Sentence]], list[TextVector]]:
    """Wrap a text tower's forward.

    tokenizer: cuts at the longest text, and knows its padding (`nev.inference.tokenizer`). prompts: text before each kind.
    forward: token ids and attention mask, int64 [b, T], to unit vectors, float32 [b, D].
    """
    padding: dict[str, Any] = tokenizer.padding or {"pad_id": 0, "direction": "right"}
    tokenizer.no_padding()

    def encode(sentences: Sequence[Sentence]) -> list[TextVector]:
        rows = tokenizer.encode_batch_fast([prompts[sentence.kind] + sentence.text for sentence in sentences])
        out: dict[int, TextVector] = {}
        for numbers in group_by_length([len(row) for row in rows]):
            group = [rows[n] for n in numbers]
            vectors = forward(*_pad(group, padding["pad_id"], padding["direction"] == "left"))
            for n, row, vector in zip(numbers, group, vectors, strict=True):
                out[n] = TextVector(vector, len(row), bool(row.overflowing))
        return [out[n] for n in range(len(rows))]

    return encode


def group_by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Texts of each forward, longest first, so that short texts do not pay for a long text beside them.

    A group has texts of at least half the tokens of its longest, and at most BATCH_TOKENS tokens with padding.
    """
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    while order:
        longest = lengths[order[0]]
        most = max(1, BATCH_TOKENS // max(1, longest))
        count = next((k for k, n in enumerate(order) if longest > 2 * lengths[n] + FREE_PADDING), len(order))
        yield order[: min(count, most)]
        order = order[min(count, most) :]


def _pad(rows: Sequence[Encoding], pad: int, left: bool) -> tuple[Ints, Ints]:
    """Token ids and attention mask, [b, T], of the longest text's length."""
    longest = max(map(len, rows))
    ids, mask = np.full((len(rows), longest), pad, np.int64), np.zeros((len(rows), longest), np.int64)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[number, place], mask[number, place] = row.ids, 1
    return ids, mask

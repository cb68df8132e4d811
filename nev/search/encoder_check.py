"""Whether the text vectors of a table were made by a model's text encoder: some of the texts are embedded again and compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from nev.ops.vectors import Floats, are_usable
from nev.search.store import SAMPLE_COLUMNS, SearchError, VectorStore, read_unit_vectors

if TYPE_CHECKING:
    from nev.inference.model import Model

DRAWN, COMPARED = 1000, 32  # texts drawn, and those of them that are embedded again
# Characters. Programs cut long texts at different lengths, so short ones are compared where there are enough.
SHORT = 400
# Stored as float16, the vectors of the same encoder agree to 0.999. Other encoders are near 0, other prompts below 0.97.
SAME_ENCODER = 0.99
APART, MOST_APART = 0.9, 0.1  # a text below this cosine is of another encoder; the share of such texts that is let pass

Prompt = Literal["query", "document"]


class Agreement(NamedTuple):
    """Cosines of the stored vectors with those of the same texts, embedded again.

    prompt: the model's prompt that fits best. median, lowest: of the cosines. texts: their number.
    apart: share of the texts whose cosine is below APART.
    """

    prompt: Prompt
    median: float
    lowest: float
    texts: int
    apart: float


def check_encoder(store: VectorStore, model: Model, width: int) -> Agreement:
    """Compare the text vectors of a table with a model's.

    Raises SearchError where another encoder made them, and where there is nothing to compare.

    width: numbers of a vector, where the table has the first so many of the model's.
    """
    texts, stored = draw_texts(store)
    if not texts:
        raise SearchError(
            f"{store.name}: its vectors may be of another text encoder than {model.spec.name}'s, and there is no text in column "
            f"{store.columns.text} to embed again. Name the column (--text-column), or vouch for the encoder by --unverified"
        )
    prompts: list[Prompt] = ["document"]
    if model.spec.prompts["query"] != model.spec.prompts["document"]:
        prompts.append("query")
    agreements = [compare(model, prompt, texts, stored, width) for prompt in prompts]
    best = max(agreements, key=lambda agreement: agreement.median)
    if best.median < SAME_ENCODER:
        listed = " and ".join(f"{each.median:.3f} as {each.prompt} (lowest {each.lowest:.3f})" for each in agreements)
        near = (
            "The vectors are near, so it may be another version of the encoder, or the vectors may be of more than this column"
            if best.median > 0.6
            else "Embed the texts by the model's own encoder, or train a model for the encoder of this table"
        )
        raise SearchError(
            f"{store.name} was made by another text encoder than {model.spec.name}'s ({model.spec.text.encoder}): {best.texts} "
            f"of its texts, embedded again, have a median cosine with the stored vectors of {listed}, and the same encoder gives "
            f"{SAME_ENCODER} or more. Nothing was written. {near}"
        )
    if best.apart > MOST_APART:
        raise SearchError(
            f"{store.name}: {best.apart:.0%} of {best.texts} texts, embedded again, have a cosine below {APART} with the "
            f"stored vectors (lowest {best.lowest:.3f}), and the others are of {model.spec.name}'s text encoder: the "
            "table mixes encoders, or texts changed without their vectors. Embed those texts again, or vouch by --unverified"
        )
    return best


def draw_texts(store: VectorStore) -> tuple[list[str], Floats]:
    """Texts of a table, short ones first, and their stored vectors."""
    rows = store.sample("text", DRAWN).select(SAMPLE_COLUMNS)
    vectors = read_unit_vectors(rows)
    usable = are_usable(vectors)
    texts = [(text, row) for row, text in enumerate(rows["text"].to_pylist()) if text and text.strip() and usable[row]]
    texts.sort(key=lambda pair: len(pair[0]) > SHORT)
    return [text for text, _ in texts[:COMPARED]], vectors[[row for _, row in texts[:COMPARED]]]


def compare(model: Model, prompt: Prompt, texts: list[str], stored: Floats, width: int) -> Agreement:
    """The cosines of stored unit vectors, [n, width], with those of the texts under a prompt."""
    cosines = (model.encode_text(texts, kind=prompt, width=width, progress=False) * stored).sum(axis=1)
    return Agreement(
        prompt, float(np.median(cosines)), float(cosines.min()), len(texts), float((cosines < APART).mean())
    )

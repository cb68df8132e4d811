"""Zero-shot classification: a class is the mean of its filled-in templates (Radford et al. 2021, section 3.1.4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from nev.eval.metrics.ranks import Floats, Ints, best_ranks, row_numbers, unit_rows


def class_embeddings(
    encode: Callable[[Sequence[str]], ArrayLike], classes: Sequence[str], templates: Sequence[str]
) -> Floats:
    """Unit float32 [C, D]: every template filled with the class name, embedded, normalised, averaged, normalised.

    encode: n sentences to [n, D], any float dtype; it is called once and does its own batching.
    classes: names in the order of the integer labels. Classes of one name are embedded once, so they have equal rows.
    templates: sentences with one `{}`.
    Raises ValueError for no class, no template, a template without exactly one `{}`, and embeddings that are not finite, of the
    wrong number or of zero length.
    """
    if not classes or not templates:
        raise ValueError(f"at least one class and one template are needed, not {len(classes)} and {len(templates)}")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"a template needs exactly one '{{}}' for the class name: {template!r}")
    distinct = list(dict.fromkeys(classes))
    sentences = [template.replace("{}", name) for name in distinct for template in templates]
    vectors = np.asarray(encode(sentences), dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != len(sentences):
        raise ValueError(f"the encoder gave {list(vectors.shape)} for {len(sentences)} sentences, not one row each")
    vectors = _normalised(vectors, sentences)
    means = _normalised(vectors.reshape(len(distinct), len(templates), -1).mean(axis=1), distinct)
    number = {name: row for row, name in enumerate(distinct)}
    return means[[number[name] for name in classes]]


def zero_shot(
    images: ArrayLike, labels: ArrayLike, classes: ArrayLike, ks: Sequence[int] = (1, 5), chunk: int = 8192
) -> dict[str, float]:
    """Share of images whose class is among the k best-scoring ones.

    images: unit [n, D]. labels: int [n], rows of `classes`. classes: unit [C, D], C >= 2. Scores are cosines in
    float32, held in tiles of at most chunk x chunk. Of tied classes the right one comes last (see `nev.eval.metrics.ranks`).

    Returns `zero_shot/top{k}` for each k < C (at k = C everybody scores 1) and `zero_shot/chance` = 1/C, top-1 by
    guessing; all in [0, 1]. Raises ValueError for labels outside 0..C-1 (-1 included) and embeddings that are not
    finite or not of unit length, naming the first such row.
    """
    return accuracies(zero_shot_ranks(images, labels, classes, chunk), len(np.asarray(classes)), ks)


def accuracies(ranks: Ints, classes: int, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """What `zero_shot` returns, from the ranks of the right classes."""
    shares = {f"zero_shot/top{k}": float(np.mean(ranks < k)) for k in ks if k < classes}
    return {**shares, "zero_shot/chance": 1 / classes}


def zero_shot_ranks(
    images: ArrayLike, labels: ArrayLike, classes: ArrayLike, chunk: int = 8192, names: Sequence[str] = ()
) -> Ints:
    """The rank of each image's class: int64 [n], 0 is first.

    names: of the classes. Of classes of one name the first one ranks before the others, as argmax has it in CLIP_benchmark and
        open_clip: ImageNet's usual names have `missile` and `sunglasses` twice.
    The other arguments and errors are those of `zero_shot`.
    """
    images, classes = unit_rows("images", images), unit_rows("classes", classes)
    if images.shape[1] != classes.shape[1]:
        raise ValueError(f"images are {images.shape[1]} wide and classes {classes.shape[1]}: use one encoder pair")
    if len(classes) < 2:
        raise ValueError("zero-shot needs at least two classes")
    labels = row_numbers("labels", labels, len(images), len(classes), "the classes")
    ranks = best_ranks(images, classes, np.arange(len(images)), labels, chunk)
    return ranks - _count_later(names)[labels] if names else ranks


def _count_later(names: Sequence[str]) -> Ints:
    """For each class, the number of later classes of the same name: int64 [C]."""
    seen = Counter[str]()
    later = []
    for name in reversed(names):
        later.append(seen[name])
        seen[name] += 1
    return np.array(later[::-1], np.int64)


def _normalised(vectors: Floats, names: Sequence[str]) -> Floats:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(length[:, 0]) | (length[:, 0] < 1e-12))
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(names)} text embeddings are zero or not finite; the first is {names[bad[0]]!r}"
        )
    return np.asarray(vectors / length, dtype=np.float32)

"""From embeddings to numbers: where the right answers rank, what share of them counts, and how sure that is."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nev.eval.metrics.ranks import Floats, Ints, mean_cosine
from nev.eval.metrics.retrieval import Ranks, recalls, retrieval_ranks
from nev.eval.metrics.zeroshot import accuracies, zero_shot_ranks
from nev.eval.validation.texts import Texts
from nev.storage.reading import DataError

if TYPE_CHECKING:
    from nev.eval.metrics.intervals import Interval


class Embedded(NamedTuple):
    """A validation set in the shared space, in index order.

    images: float32 [n, D]; valid: bool [n], False where the image could not be decoded; labels: int64 [n], -1 if unknown.
    """

    images: NDArray[np.float32]
    valid: NDArray[np.bool_]
    labels: NDArray[np.int64]


class Pairs(NamedTuple):
    """Images that could be decoded and have a text, unit [n, D]; their texts, unit [m, D]; owner: int64 [m], a text's image."""

    images: Floats
    texts: Floats
    owner: Ints


class Ranked(NamedTuple):
    """Where the right answers of a set rank. zero_shot: int64 [labelled images] over so many classes; retrieval: with owners.

    alike: mean cosine of two images, None for fewer.
    """

    rows: int
    bad_rows: int
    alike: float | None = None
    zero_shot: Ints | None = None
    classes: int = 0
    retrieval: Ranks | None = None
    owner: Ints | None = None


def rank_answers(root: str, embedded: Embedded, texts: Texts) -> Ranked:
    """Rank what there are texts for, over the rows that could be decoded. root: the set, for an error.

    Raises DataError where no row can be scored.
    """
    seen = embedded.images[embedded.valid]
    alike = mean_cosine(seen) if len(seen) > 1 else None
    found = Ranked(len(embedded.valid), int((~embedded.valid).sum()), alike)
    if texts.classes is not None:
        labelled = embedded.valid & (embedded.labels >= 0)
        _refuse_none(labelled, root, "a label and an image that can be decoded")
        ranks = zero_shot_ranks(embedded.images[labelled], embedded.labels[labelled], texts.classes)
        found = found._replace(zero_shot=ranks, classes=len(texts.classes))
    if pairs := make_pairs(root, embedded, texts):
        found = found._replace(retrieval=retrieval_ranks(*pairs), owner=pairs.owner)
    return found


def make_pairs(root: str, embedded: Embedded, texts: Texts) -> Pairs | None:
    """The images and captions that describe each other, None where captions were not asked for. Raises DataError for none."""
    if texts.captions is None or texts.owner is None:
        return None
    captioned = np.isin(np.arange(len(embedded.valid)), texts.owner) & embedded.valid
    _refuse_none(captioned, root, "a caption and an image that can be decoded")
    kept, position = captioned[texts.owner], np.cumsum(captioned) - 1
    return Pairs(embedded.images[captioned], texts.captions[kept], position[texts.owner[kept]])


def compute_shares(found: Ranked) -> dict[str, float]:
    """The metrics of a set, `nev.eval.metrics.zeroshot`'s and `nev.eval.metrics.retrieval`'s, with the rows that there are."""
    metrics = {"val/rows": float(found.rows), "val/bad_rows": float(found.bad_rows)}
    if found.alike is not None:
        metrics["space/anisotropy_images"] = found.alike
    if found.zero_shot is not None:
        metrics |= accuracies(found.zero_shot, found.classes)
    if found.retrieval and found.owner is not None:
        metrics |= recalls(found.retrieval, found.owner)
    return metrics


def compute_intervals(found: Ranked) -> dict[str, Interval]:
    """A 95 % interval for each share of `compute_shares`, by drawing images anew."""
    from nev.eval.metrics.intervals import interval  # scipy takes its time, and training needs none of it

    sure: dict[str, Interval] = {}
    if found.zero_shot is not None:
        names = [name for name in accuracies(found.zero_shot, found.classes) if "top" in name]
        sure |= {name: interval(found.zero_shot < int(name.rpartition("top")[2])) for name in names}
    if found.retrieval and found.owner is not None:
        for way, ranks, image in (
            ("text_to_image", found.retrieval.texts, found.owner),
            ("image_to_text", found.retrieval.images, None),
        ):
            sure |= {f"retrieval/{way}/r{k}": interval(ranks < k, image) for k in (1, 5, 10)}
    return sure


def compute_metrics(root: str, embedded: Embedded, texts: Texts) -> dict[str, float]:
    """All that can be said of a set: shares, the ends of their intervals (`..._low`, `..._high`), and of the space where there
    are captions. Raises DataError where no row can be scored.
    """
    ranked = rank_answers(root, embedded, texts)
    metrics = compute_shares(ranked)
    for name, sure in compute_intervals(ranked).items():
        metrics |= {f"{name}_low": sure.low, f"{name}_high": sure.high}
    if pairs := make_pairs(root, embedded, texts):
        metrics |= measure_space(pairs)
    return metrics


def list_metric_names(classes: int, captions: int) -> set[str]:
    """The names of `compute_metrics`.

    classes: of the set; 0 where zero-shot is not scored. captions: of an image; 0 where retrieval is not scored.
    """
    random = np.random.default_rng(0)

    def unit(rows: int) -> Floats:
        vectors = random.normal(size=(rows, 8))
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)

    rows = 24
    embedded = Embedded(unit(rows), np.ones(rows, bool), np.arange(rows) % max(1, classes))
    owner = np.repeat(np.arange(rows), captions) if captions else None
    texts = Texts(unit(classes) if classes else None, unit(captions * rows) if captions else None, owner)
    return set(compute_metrics("", embedded, texts))


def measure_space(pairs: Pairs) -> dict[str, float]:
    """`nev.eval.metrics.geometry`'s and `nev.eval.metrics.mixed_retrieval`'s numbers; nothing for fewer pairs than they want."""
    from nev.eval.metrics.geometry import FOLDS, geometry
    from nev.eval.metrics.mixed_retrieval import mixed_retrieval, text_retrieval

    if min(len(pairs.images), len(pairs.texts)) < FOLDS:
        return {}
    return geometry(*pairs) | mixed_retrieval(*pairs) | text_retrieval(pairs.texts, pairs.owner)


def _refuse_none(rows: NDArray[np.bool_], root: str, what: str) -> None:
    if not rows.any():
        raise DataError(f"{root}: no row has {what}, so there is nothing to score. Mend data.val.")

"""An index of texts and pictures: one ranked list of both for a vector, from whatever store the items lie in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from nev.config.model_spec import Calibration
from nev.ops.vectors import Floats, are_usable, scale_to_unit
from nev.search.open import open_store
from nev.search.ranking import (
    Means,
    Sample,
    compute_percentiles,
    fuse_ranks,
    image_candidates_query,
    make_sample,
    move_images,
    read_means,
)
from nev.search.store import IMAGE, TEXT, Columns, Kind, SearchError, StoreSpec, VectorStore, Where, read_unit_vectors

SAMPLE = 1000  # vectors a modality, for percentiles
MARGIN = 20  # items that a store is asked for beyond the page, so that equal scores are put in order of their uids
FUSED = 200  # hits of each search in a list that is fused with the full text's
MOST_EQUAL = 4096  # items of one score beyond which their order is the store's
CALIBRATED_FACTOR, CALIBRATED_LEAST = 5, 200  # pictures of a calibrated list are fetched in excess, then ranked exactly


class Hit(NamedTuple):
    """An item of a ranked list.

    score: cosine, after calibration where the list is calibrated.
    percentile: the share of 1,000 fixed items of the hit's kind, in percent, that score no higher for this query. None: the index
        has fewer than 100 of the kind.
    vector: float32 [D], of unit length, not calibrated.
    """

    uid: str
    kind: Kind
    score: float
    percentile: float | None
    text: str | None
    source: str | None
    vector: Floats


@dataclass
class Index:
    """A store that is open for search. `open_index` makes one. Threads may share it."""

    store: VectorStore
    spec: StoreSpec | None
    _samples: dict[Kind, Sample] = field(default_factory=dict, repr=False)

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        return self.store.width or 0

    @property
    def calibration(self) -> Calibration | None:
        """Means for lists of pictures and texts. None: lists are ranked by plain cosine."""
        return self.spec.calibration if self.spec else None

    def count(self, kind: Kind | None = None) -> int:
        """Items with a vector, of one kind or of both."""
        return self.store.count(kind)

    def refresh(self) -> None:
        """Read again what is remembered: the record of the store, and the samples for percentiles."""
        self.spec = self.store.read_spec()
        self._samples.clear()

    def thumbnail(self, uid: str) -> bytes | None:
        """The thumbnail of a picture: JPEG. None: there is no such item, or no thumbnail."""
        thumbnails = self.store.read([uid], ["uid", "thumbnail"])["thumbnail"].to_pylist()
        return thumbnails[0] if thumbnails else None

    def vector(self, uid: str) -> Floats | None:
        """The vector of an item, float32 [D], of unit length. None: there is no such item, or no vector."""
        vectors = read_unit_vectors(self.store.read([uid], ["uid", "vector"]).drop_null())
        return vectors[0] if len(vectors) else None

    def read(self, uids: Sequence[str]) -> pa.Table:
        """Whole items, in any order, thumbnails included. Unknown uids are left out."""
        return self.store.read(uids)

    def sample(self, kind: Kind, count: int = SAMPLE, seed: int = 0) -> pa.Table:
        """At most `count` items of a kind, the same at every call: uid, text, vector (as it is stored, of any length)."""
        return self.store.sample(kind, count, seed)

    def close(self) -> None:
        """Close connections. The index opens them again where it is used afterwards."""
        self.store.close()

    def search(
        self,
        vector: ArrayLike,
        query_kind: Kind = "text",
        top: int = 10,
        offset: int = 0,
        kind: Kind | None = None,
        where: Where | None = None,
        words: str | None = None,
        min_score: float | None = None,
        min_percentile: float | None = None,
        calibrated: bool = True,
    ) -> list[Hit]:
        """The items nearest to a vector, in one list of both kinds, best first. Of equal scores the smaller uid is first.

        vector: float [D], of any length.
        query_kind: what the vector was made of. A picture's is moved by the calibration, too.
        top, offset: length of the page, and hits before the page.
        kind: hits of one kind alone.
        where: column to value: rows that hold exactly these values. None stands for NULL.
        words: search the full text for these words, too. The order is by reciprocal rank fusion of the first FUSED hits of each
            search, where the list ends; `score` stays the cosine.
        min_score, min_percentile: the least that a hit has. A hit whose percentile is None is not left out by `min_percentile`.
        calibrated: move pictures by the distance of the means (as `nev.Model.rank`). Without effect where the index has no means.
        Raises SearchError for a vector of another width or without direction, for a column that is not there, and for words where
        the store has no full text.
        """
        if top < 1 or offset < 0:
            raise SearchError(f"top {top}, offset {offset}: top is at least 1, and offset at least 0")
        means = read_means(self.calibration) if calibrated and self.calibration else None
        query = self._prepare(vector, means if query_kind == IMAGE else None)
        need = FUSED if words else offset + top  # pages of one fused list join
        kinds: list[Kind] = [kind] if kind else ["image", "text"]
        hits = [hit for each in kinds for hit in self._nearest(each, query, need, where, means)]
        hits.sort(key=lambda hit: (-hit.score, hit.uid))
        hits = _cut_off(hits, min_score, min_percentile)
        if words:
            matching = self._score(self.store.search_words(words, FUSED, kind, where), query, means)
            hits = _fuse(hits[:FUSED], _cut_off(matching, min_score, min_percentile))
        return hits[offset : offset + top]

    def _prepare(self, vector: ArrayLike, means: Means | None) -> Floats:
        """The query, [D], of unit length, moved like a picture where there are means."""
        rows = np.asarray(vector, np.float32).reshape(1, -1)
        if rows.shape[1] != self.width:
            raise SearchError(
                f"a query of {rows.shape[1]} numbers, and the vectors of {self.store.name} have {self.width}"
            )
        if not are_usable(rows).all():
            raise SearchError("a query of zeros, or with numbers that are not finite, has no direction")
        query: Floats = move_images(scale_to_unit(rows), means)[0]
        return query

    def _nearest(self, kind: Kind, query: Floats, need: int, where: Where | None, means: Means | None) -> list[Hit]:
        """The first `need` items of a kind, and some more, with exact scores."""
        if kind == IMAGE and means:
            vector = image_candidates_query(query, means, self._sample(IMAGE))
            fetch = max(min(CALIBRATED_FACTOR * need, 2 * need + 300), CALIBRATED_LEAST)
        else:
            vector, fetch = query, need + MARGIN
        while True:
            items = self.store.search(vector, fetch, kind, where)
            hits = self._score(items, query, means)
            scores = sorted((hit.score for hit in hits), reverse=True)
            # Where equal scores reach from the page to the end of what was fetched, the store chose among them.
            if (
                items.num_rows < fetch
                or len(scores) < need
                or scores[need - 1] > scores[-1]
                or fetch >= need + MOST_EQUAL
            ):
                return hits
            fetch *= 4

    def _score(self, items: pa.Table, query: Floats, means: Means | None) -> list[Hit]:
        """Items as hits with exact scores, in the order given. Items without a direction are left out."""
        vectors = read_unit_vectors(items)
        usable = are_usable(vectors)
        items, vectors = items.filter(pa.array(usable)), vectors[usable]
        is_image = np.asarray(items["kind"].to_pylist()) == IMAGE
        scores = np.where(is_image, move_images(vectors, means) @ query, vectors @ query)
        percentiles = np.full(len(scores), np.nan)
        kinds: tuple[tuple[Kind, NDArray[np.bool_]], ...] = ((IMAGE, is_image), (TEXT, ~is_image))
        for kind, rows in kinds:
            if rows.any():
                sample = self._sample(kind)
                percentiles[rows] = compute_percentiles(scores[rows], sample.moved if means else sample.vectors, query)
        columns = (items[name].to_pylist() for name in ("uid", "kind", "text", "source"))
        return [
            Hit(uid, kind, float(score), None if np.isnan(share) else float(share), text, source, vector)
            for uid, kind, text, source, score, share, vector in zip(
                *columns, scores, percentiles, vectors, strict=True
            )
        ]

    def _sample(self, kind: Kind) -> Sample:
        """Fixed items of a kind. A sample of fewer than SAMPLE is drawn again when the table has grown."""
        sample = self._samples.get(kind)
        if sample is not None and (sample.drawn >= SAMPLE or sample.drawn == self.store.count(kind)):
            return sample
        vectors = read_unit_vectors(self.store.sample(kind, SAMPLE))
        means = read_means(self.calibration) if kind == IMAGE and self.calibration else None
        self._samples[kind] = make_sample(vectors, means)
        return self._samples[kind]


def _cut_off(hits: list[Hit], min_score: float | None, min_percentile: float | None) -> list[Hit]:
    """The hits that have the least score and the least percentile."""
    return [
        hit
        for hit in hits
        if (min_score is None or hit.score >= min_score)
        and (min_percentile is None or hit.percentile is None or hit.percentile >= min_percentile)
    ]


def _fuse(nearest: list[Hit], matching: list[Hit]) -> list[Hit]:
    """The nearest hits, and those of the full text, in one list."""
    fused = fuse_ranks([[hit.uid for hit in nearest], [hit.uid for hit in matching]])
    hits = {hit.uid: hit for hit in (*nearest, *matching)}
    return sorted(hits.values(), key=lambda hit: (-fused[hit.uid], -hit.score, hit.uid))


def open_index(location: str, table: str = "items", columns: Columns | None = None, store: str | None = None) -> Index:
    """Open a table for search.

    location: `postgresql://...`; a folder or `s3://` prefix of LanceDB (`*.lance`) or of parquet files.
    table: name of the table.
    columns: names of its columns. None: as recorded by `nev index`, else those of `Columns`.
    store: `lancedb`, `postgres` or `exact`, where the location alone does not tell.
    Raises SearchError where there is no such table, or it cannot be searched.
    """
    opened = open_store(location, table, columns, store)
    if opened.width is None:
        raise SearchError(f"{opened.name}: no such table. `nev index` makes one")
    return Index(opened, opened.read_spec())

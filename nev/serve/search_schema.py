"""What `/search` is given, and what it answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Kind = Literal["image", "text"]
QueryKind = Literal["image", "text", "both"]
Value = str | int | float | bool | None
Pair = Annotated[list[float], Field(min_length=2, max_length=2)]  # no tuple: OpenAPI documents of tuples differ


class ListOptions(BaseModel):
    """An item to search for, and which hits are listed."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    uid: str | None = None
    """An item of the index, for more like it. The item itself is no hit."""
    top: int = Field(default=20, ge=1)
    """Most hits."""
    offset: int = Field(default=0, ge=0)
    """Hits that are left out at the beginning, for the next page."""
    kind: Kind | None = None
    """Hits of one kind. null: both in one list."""
    min_score: float | None = Field(default=None, allow_inf_nan=False)
    """Least score of a hit."""
    min_percentile: float | None = Field(default=None, ge=0, le=100)
    """Least percentile of a hit."""
    calibrated: bool = True
    """Whether pictures are moved to where the texts are. Without it, all texts come before all pictures."""
    hybrid: bool = False
    """Whether the full text is searched for the words, too."""


class SearchQuestion(ListOptions):
    """What is searched for: words, a picture, an item of the index, or several of them, whose vectors are then averaged."""

    text: str | None = None
    """Words. They are never taken for an address or a path."""
    image: str | None = None
    """A picture as a data URL; an http or https address where the server allows them."""
    where: dict[str, Value] | None = None
    """Columns, and the values that hits have in them."""


class WordsQuestion(ListOptions):
    """What is searched for by an address: words, or an item of the index."""

    q: str | None = None
    """Words."""

    def as_question(self) -> SearchQuestion:
        """The same question as POST takes it."""
        return SearchQuestion(text=self.q, **self.model_dump(exclude={"q"}))


class FoundItem(BaseModel):
    """A hit. score: cosine, after calibration. percentile: of the score within the index's items of this kind, for this query."""

    uid: str
    kind: Kind
    score: float
    percentile: float | None
    text: str | None
    source: str | None
    thumbnail: bool
    position: Pair
    """Place on the map with the same `calibrated`."""


class QuerySummary(BaseModel):
    """What was searched for. position: of the query on the map with the same `calibrated`."""

    kind: QueryKind
    position: Pair


class SearchAnswer(BaseModel):
    """Hits, best first. calibrated: whether pictures were moved, which needs an index with the means of a validation."""

    hits: list[FoundItem]
    offset: int
    top: int
    calibrated: bool
    query: QuerySummary
    milliseconds: float

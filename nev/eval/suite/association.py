"""WinoGAViL (Bitton et al. 2022): which pictures go with a word? As many are chosen as do; Jaccard's index tells how well."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError, model_validator

from nev.config.base import ConfigError
from nev.eval.metrics.intervals import Interval, interval
from nev.eval.suite.collection import Collection
from nev.eval.suite.reading import resolve_input
from nev.eval.suite.schema import Task
from nev.storage.files import join
from nev.storage.reading import read_bytes

HARD = 10  # candidates, from which on an instance is one of the hard ones, which DataComp counts


class Instance(BaseModel):
    """A line of test.jsonl: a word, the pictures to choose from, and those that belong to it, by name."""

    cue: Annotated[str, Field(min_length=1)]
    candidates: Annotated[tuple[str, ...], Field(min_length=2)]
    associations: Annotated[tuple[str, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _among_them(self) -> Self:
        if absent := set(self.associations) - set(self.candidates):
            raise ValueError(f"{sorted(absent)[0]!r} belongs to the cue, and is no candidate")
        return self


def jaccard(
    task: Task, found: Collection, encode: Callable[[Sequence[str]], NDArray[np.float32]], root: str
) -> tuple[dict[str, float], dict[str, Interval]]:
    """`jaccard`, over instances with ten candidates or more (all, where there are none), and `jaccard_all`, with intervals.

    An instance with a picture that is absent or cannot be decoded is left out and counted. Raises ConfigError for a file that is
    not there or is no such list, and where every instance is left out.
    """
    location = join(resolve_input(task.source.input, root), "test.jsonl")
    instances = _instances(location)
    place = {fact.uid: row for row, fact in enumerate(found.facts) if found.embedded.valid[row]}
    whole = [one for one in instances if place.keys() >= set(one.candidates)]
    if not whole:
        raise ConfigError(f"{location}: no instance has all of its pictures in images/")
    cues = encode([_sentence(task.prompt, one.cue) for one in whole])
    scores = np.array(
        [
            _jaccard(
                found.embedded.images[[place[name] for name in one.candidates]] @ cue,
                np.isin(one.candidates, one.associations),
            )
            for one, cue in zip(whole, cues, strict=True)
        ]
    )
    hard = np.array([len(one.candidates) >= HARD for one in whole])
    judged = scores[hard] if hard.any() else scores
    metrics = {
        "jaccard": float(judged.mean()),
        "jaccard_all": float(scores.mean()),
        "left_out": float(len(instances) - len(whole)),
    }
    return metrics, {"jaccard": interval(judged), "jaccard_all": interval(scores)}


def _jaccard(scores: NDArray[np.float32], right: NDArray[np.bool_]) -> float:
    """Of the best-scoring candidates, as many as are right, the share that both sets have in common of what either has."""
    chosen = np.zeros(len(scores), np.bool_)
    chosen[np.argsort(-scores, kind="stable")[: right.sum()]] = True
    return float((chosen & right).sum() / (chosen | right).sum())


def _sentence(prompt: str, cue: str) -> str:
    """The cue in its sentence; after the article "A", which becomes "An" before a vowel, in small letters."""
    cue = cue.lower()
    return ("An {}" if prompt == "A {}" and cue[0] in "aeiou" else prompt).replace("{}", cue)


def _instances(location: str) -> list[Instance]:
    content = read_bytes(location)
    if content is None:
        raise ConfigError(
            f"{location}: no such file; it needs a line of JSON an instance: cue, candidates, associations"
        )
    found = []
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), start=1):
        try:
            if line.strip():
                found.append(Instance.model_validate(json.loads(line)))
        except (ValueError, ValidationError) as error:
            raise ConfigError(f"{location}:{number}: not an instance ({error})") from error
    return found

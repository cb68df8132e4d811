"""WinoGAViL (Bitton et al. 2022): which pictures go with a word? The choice is scored by Jaccard's index."""

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

HARD = 10  # candidates: instances with at least so many are the hard ones, which DataComp counts


class Instance(BaseModel):
    """A line of test.jsonl: a word, the names of the pictures to choose from, and the names of those that belong to the word."""

    cue: Annotated[str, Field(min_length=1)]
    candidates: Annotated[tuple[str, ...], Field(min_length=2)]
    associations: Annotated[tuple[str, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _among_them(self) -> Self:
        if absent := set(self.associations) - set(self.candidates):
            raise ValueError(f"{sorted(absent)[0]!r} belongs to the cue, and is no candidate")
        return self


def jaccard(
    task: Task, collection: Collection, encode: Callable[[Sequence[str]], NDArray[np.float32]], root: str
) -> tuple[dict[str, float], dict[str, Interval]]:
    """The metrics `jaccard` and `jaccard_all`, and their intervals.

    `jaccard_all` is over all instances; `jaccard` over those with ten candidates or more, or over all where none has as many.
    Instances with a picture that is absent or cannot be decoded are left out, and counted as `left_out`.
    Raises ConfigError for a file that is absent or is no such list, and where every instance is left out.
    """
    location = join(resolve_input(task.source.input, root), "test.jsonl")
    instances = _instances(location)
    images, valid, _ = collection.embedded
    place = {fact.uid: row for row, fact in enumerate(collection.facts) if valid[row]}
    usable = [instance for instance in instances if place.keys() >= set(instance.candidates)]
    if not usable:
        raise ConfigError(f"{location}: no instance has all of its pictures in images/")
    cues = encode([_sentence(task.prompt, instance.cue) for instance in usable])
    scores = np.array(
        [
            _jaccard(
                images[[place[name] for name in instance.candidates]] @ cue,
                np.isin(instance.candidates, instance.associations),
            )
            for instance, cue in zip(usable, cues, strict=True)
        ]
    )
    hard = np.array([len(instance.candidates) >= HARD for instance in usable])
    judged = scores[hard] if hard.any() else scores
    metrics = {
        "jaccard": float(judged.mean()),
        "jaccard_all": float(scores.mean()),
        "left_out": float(len(instances) - len(usable)),
    }
    return metrics, {"jaccard": interval(judged), "jaccard_all": interval(scores)}


def _jaccard(scores: NDArray[np.float32], right: NDArray[np.bool_]) -> float:
    """Intersection over union of the right candidates and as many of the best-scoring candidates."""
    chosen = np.zeros(len(scores), np.bool_)
    chosen[np.argsort(-scores, kind="stable")[: right.sum()]] = True
    return float((chosen & right).sum() / (chosen | right).sum())


def _sentence(prompt: str, cue: str) -> str:
    """The cue, in lower case, in the prompt. The prompt "A {}" becomes "An {}" before a vowel."""
    cue = cue.lower()
    return ("An {}" if prompt == "A {}" and cue[0] in "aeiou" else prompt).replace("{}", cue)


def _instances(location: str) -> list[Instance]:
    content = read_bytes(location)
    if content is None:
        raise ConfigError(
            f"{location}: no such file; it needs a line of JSON for each instance: cue, candidates, associations"
        )
    instances = []
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), start=1):
        try:
            if line.strip():
                instances.append(Instance.model_validate(json.loads(line)))
        except (ValueError, ValidationError) as error:
            raise ConfigError(f"{location}:{number}: not an instance ({error})") from error
    return instances

"""The schema of what is measured on a run's validation set: the section `eval`."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from nev.config.base import Location, Positive, Section


class ZeroShot(Section):
    """Classes as sentences (Radford et al. 2021): the vector of a class is the mean of its filled-in templates."""

    classes: tuple[str, ...] | Location
    """Class names in the order of the integer labels: a list, or a text file of one name a line."""
    templates: tuple[str, ...] = ("a photo of a {}.",)
    """Sentences, each with one `{}` for the class name."""

    @model_validator(mode="after")
    def _has_slot(self) -> Self:
        for template in self.templates:
            if template.count("{}") != 1:
                raise ValueError(f"a template needs exactly one '{{}}' for the class name: {template!r}")
        return self


class Eval(Section):
    """What is measured on `data.val`."""

    zero_shot: ZeroShot | None = None
    """Zero-shot classification by the label column. null: none."""
    retrieval: bool = False
    """Retrieval between images and captions, both ways."""
    batch: Positive = 256
    """Images embedded at a time."""
    best: str | None = None
    """Metric by which the best checkpoint is chosen, such as `zero_shot/top1`. null: the newest checkpoint counts."""
    patience: Positive | None = None
    """Validations in a row without a better `best` after which the run ends. null: the run goes to its last step."""
    asynchronous: bool = False
    """Validation of checkpoints by the driver, beside training, on GPUs that the workers leave free, or on CPUs. false: the
    workers validate, and training waits.
    """

    @model_validator(mode="after")
    def _patience_with_what(self) -> Self:
        if self.patience and not self.best:
            raise ValueError("patience needs `best`, the metric that has to improve")
        return self

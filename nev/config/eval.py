"""The schema of what is measured on a run's validation set: the section `eval`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, model_validator

from nev.config.base import Location, Positive, Section

IMAGENET: Literal["imagenet"] = "imagenet"


class ZeroShot(Section):
    """Classes as sentences (Radford et al. 2021): the vector of a class is the mean of its filled-in templates."""

    classes: tuple[str, ...] | Location
    """Class names in the order of the integer labels: a list, a text file of one name a line, or `imagenet` (its 1,000)."""
    templates: tuple[str, ...] | Literal["imagenet"] = ("a photo of a {}.",)
    """Sentences, each with one `{}` for the class name, or `imagenet` (the 80 of Radford et al. 2021)."""

    @model_validator(mode="after")
    def _has_slot(self) -> Self:
        for template in () if self.templates == IMAGENET else self.templates:
            if template.count("{}") != 1:
                raise ValueError(f"a template needs exactly one '{{}}' for the class name: {template!r}")
        return self


def _name_imagenet(value: Any) -> Any:
    return {"classes": IMAGENET, "templates": IMAGENET} if value == IMAGENET else value


class Eval(Section):
    """What is measured on `data.val`."""

    zero_shot: Annotated[ZeroShot | None, BeforeValidator(_name_imagenet)] = None
    """Zero-shot classification by the label column. `imagenet`: its classes and its templates. null: none."""
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

"""The schema of an ablation: one YAML file over a base experiment."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from nev.config.base import Positive, Section

LR_RULE = "lr_rule"

Settings = dict[str, Any]  # dotted keys of an experiment, or lr_rule, to values


class Draw(Section):
    """A distribution that values of a setting are drawn from, one of Ray Tune's: exactly one key."""

    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    randint: tuple[int, int] | None = None
    choice: tuple[Any, ...] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise ValueError("give exactly one of uniform, loguniform, randint and choice")
        ends = self.uniform or self.loguniform or self.randint
        if ends and not ends[0] < ends[1]:
            raise ValueError(f"the lower end must be below the upper one, not {list(ends)}")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError("loguniform needs ends above 0")
        return self


class Asha(Section):
    """Asynchronous successive halving (Li et al. 2020): of the trials that have seen as much, one in `reduction` goes on.

    `grace`: samples that every trial sees. The trials are judged at their validations, so the base needs `train.eval_every`.
    """

    grace: Positive
    reduction: int = Field(default=3, ge=2)


class Sweep(Section):
    """An ablation: a base experiment with `overrides`, settings to vary, seeds, and a budget in samples seen by every trial.

    `axes`: a dotted key to its values, or any name to arms, each a label with the settings that it stands for. All combinations
    are tried. `search` draws `draws` more settings for each of these combinations instead of listing them. `lr_rule` scales
    optim.lr with train.global_batch against the base's ("linear": Goyal et al. 2017; "sqrt": Krizhevsky 2014), and may be an
    axis; warm-up and validations come after the same number of samples at every batch size.

    `metrics`: what is compared; the first decides, by `mode`. `reference`: axis to the value or label that the others are
    compared with (by default the first of each). `suite`: a suite that each trial's checkpoint is scored on, too (its metrics
    are TASK/METRIC). `concurrent`: trials at a time (by default what the cluster has room for). `seeds`: the same for every arm,
    so that differences are paired by seed.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    question: str = ""
    base: str
    overrides: Settings = Field(default={})
    axes: dict[str, tuple[Any, ...] | dict[str, Settings]] = Field(default={})
    search: dict[str, Draw] = Field(default={})
    draws: Positive | None = None
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    samples: Positive
    metrics: tuple[str, ...] = Field(min_length=1)
    mode: Literal["max", "min"] = "max"
    reference: dict[str, Any] = Field(default={})
    lr_rule: Literal["constant", "sqrt", "linear"] = "constant"
    suite: str | None = None
    concurrent: Positive | None = None
    asha: Asha | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if not self.axes and not self.search:
            raise ValueError("give axes, or search: there is nothing to vary")
        if bool(self.search) != bool(self.draws):
            raise ValueError("search needs `draws`, how many settings to try, and draws needs search")
        if both := self.axes.keys() & self.search.keys():
            raise ValueError(f"{', '.join(sorted(both))}: on an axis and in search")
        if self.asha and self.asha.grace >= self.samples:
            raise ValueError(f"asha.grace ({self.asha.grace}) must be below samples ({self.samples})")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)}: each one once")
        for axis, values in self.axes.items():
            labels = make_labels(values)
            if not labels or len(set(labels)) < len(labels):
                raise ValueError(f"axes.{axis}: give different values, one at least")
        for axis, value in self.reference.items():
            if axis not in self.axes or str(value) not in make_labels(self.axes[axis]):
                raise ValueError(f"reference.{axis}: {value!r} is not on that axis")
        return self


def make_labels(values: tuple[Any, ...] | dict[str, Settings]) -> list[str]:
    """The values of an axis as they are shown, in order."""
    return [str(value) for value in values]

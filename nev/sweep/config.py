"""The schema of an ablation: one YAML file over a base experiment."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from nev.config.base import MOST, Positive, PositiveShare, Section, Seed

Number = Annotated[float, Field(ge=-1e15, le=1e15)]
Whole = Annotated[int, Field(ge=-MOST, le=MOST)]

LR_RULE = "lr_rule"

Settings = dict[str, Any]  # dotted keys of an experiment, or lr_rule, to values


class Draw(Section):
    """A distribution of Ray Tune from which values of a setting are drawn. Exactly one key is given."""

    uniform: tuple[Number, Number] | None = None
    """Lower and upper end of an even distribution."""
    loguniform: tuple[Number, Number] | None = None
    """Lower and upper end, above 0, of a distribution that is even in the logarithm."""
    randint: tuple[Whole, Whole] | None = None
    """Lower end (included) and upper end (left out) of whole numbers."""
    choice: tuple[Any, ...] | None = None
    """Values, each as likely as the others."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise ValueError("give exactly one of uniform, loguniform, randint and choice")
        ends = self.uniform or self.loguniform or self.randint
        if ends and not ends[0] < ends[1]:
            raise ValueError(f"the lower end must be below the upper one, not {list(ends)}")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError("loguniform needs ends above 0")
        return self


class Asha(Section):
    """Asynchronous successive halving (Li et al. 2020). Trials are compared at validations: the base needs `train.eval_every`."""

    grace: Positive
    """Samples that every trial sees before ASHA may end it."""
    reduction: int = Field(default=3, ge=2, le=MOST)
    """Reduction factor x: of the trials that have seen as many samples, the best 1/x continues."""


class Sweep(Section):
    """An ablation: a base experiment, settings to vary, seeds, and a budget in samples."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the sweep and of its folder."""
    question: str = ""
    """Question that the sweep answers, shown above its results."""
    base: str
    """Experiment file that every trial starts from."""
    overrides: Settings = Field(default={})
    """Settings of the base that are replaced in every trial, by dotted key."""
    axes: dict[str, tuple[Any, ...] | dict[str, Settings]] = Field(default={})
    """What varies: a dotted key with its values, or any name with arms, each arm a label with its settings. All combinations are
    tried.
    """
    search: dict[str, Draw] = Field(default={})
    """Dotted keys whose values are drawn from a distribution, for each combination of the axes."""
    draws: Positive | None = None
    """Number of settings drawn by `search` for each combination of the axes."""
    seeds: tuple[Seed, ...] = Field(default=(0,), min_length=1)
    """Seeds that every arm is trained with; differences are paired by seed."""
    samples: Positive
    """Budget of every trial, in rows seen, rounded up to whole steps."""
    metrics: tuple[str, ...] = Field(min_length=1)
    """Metrics that are compared; the first one decides."""
    margin: PositiveShare = 0.01
    """Difference of shares, such as accuracies, that does not matter. Arms that differ by less for sure are called equal."""
    mode: Literal["max", "min"] = "max"
    """Direction in which the first metric is better."""
    reference: dict[str, Any] = Field(default={})
    """Axis to the value or label that the other arms are compared with. An axis that is left out: its first value."""
    lr_rule: Literal["constant", "sqrt", "linear"] = "constant"
    """Scaling of optim.lr with train.global_batch against the base's: `linear` (Goyal et al. 2017), `sqrt` (Krizhevsky 2014), or
    `constant`. May be an axis. Warm-up and validations come after the same number of samples at every batch size.
    """
    suite: str | None = None
    """Suite that each trial's checkpoint is scored on; the metrics are called TASK/METRIC. null: none."""
    concurrent: Positive | None = None
    """Trials that run at a time. null: as many as the cluster has room for when the sweep starts."""
    asha: Asha | None = None
    """Early end of trials that are behind. null: every trial sees the whole budget."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.axes and not self.search:
            raise ValueError("give axes, or search: there is nothing to vary")
        if bool(self.search) != bool(self.draws):
            raise ValueError("search needs `draws`, how many settings to try, and draws needs search")
        if both := self.axes.keys() & self.search.keys():
            raise ValueError(f"{', '.join(sorted(both))}: both on an axis and in search; leave one out")
        if self.asha and self.asha.grace >= self.samples:
            raise ValueError(f"asha.grace ({self.asha.grace}) must be below samples ({self.samples})")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)}: give each seed once")
        for axis, values in self.axes.items():
            labels = make_labels(values)
            if not labels or len(set(labels)) < len(labels):
                raise ValueError(f"axes.{axis}: give different values, one at least")
        for axis, value in self.reference.items():
            if axis not in self.axes or str(value) not in make_labels(self.axes[axis]):
                raise ValueError(f"reference.{axis}: {value!r} is not on that axis")
        return self


def make_labels(values: tuple[Any, ...] | dict[str, Settings]) -> list[str]:
    """The labels of an axis' values, in order."""
    return [str(value) for value in values]

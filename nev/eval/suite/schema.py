"""The schema of a suite: sets, tasks, and published scores. `shipped/` has the usual suites."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from nev.common.location import absolute_location
from nev.config.base import ConfigError, Location, Section, Share
from nev.config.data import Columns
from nev.config.file import parse, read_yaml

Kind = Literal["zero_shot", "retrieval", "alignment", "robustness", "compression", "association"]
Format = Literal["clip-benchmark", "webdataset", "hf-parquet", "folder-classes", "folder-captions", "winogavil"]
VALIDATION = "validation"  # name of the suite that a run's own set makes
# Metrics that a task of a kind may be judged by; the first is the default.
METRICS: dict[str, tuple[str, ...]] = {
    "zero_shot": ("top1", "top5", "mean_per_class", "worst_group_top1", "worst_group_top5", "macro_f1"),
    "retrieval": ("mean_recall_1", "text_to_image_r1", "image_to_text_r1"),
    "alignment": ("overlap",),
    "robustness": ("retained",),
    "compression": ("retained",),
    "association": ("jaccard",),
}


class DataSource(Section):
    """Where a task's pictures are."""

    format: Format
    """Format of the data. `clip-benchmark`: a folder of CLIP_benchmark's, with tars in `test/`, `classnames.txt` and
    `zeroshot_classification_templates.txt`. `winogavil`: `images/`, and a `test.jsonl` of cue, candidates and associations.
    """
    input: str
    """Folder, file or pattern, relative to the suite's `root` unless absolute."""
    columns: Columns = Columns()
    """Column names of the data."""
    label_name: str | None = None
    """Column of the class names, in Hugging Face's parquet. null: none."""
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the rows that is used, drawn by uid."""


class Group(Section):
    """Division of a set into groups, for metrics of the worst group."""

    field: str
    """Column, JSON key or tar member that holds the group."""
    place: int = Field(default=0, ge=0)
    """Position of the group in a field that is an array, from 0."""
    leave_out: tuple[str, ...] = ()
    """Values whose rows are in no group."""


class Task(Section):
    """A task: a set, and how it is scored. Tasks with the same `source` share its embeddings."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the task in the results."""
    kind: Kind
    """Kind of score."""
    source: DataSource
    """Data of the task."""
    classes: tuple[str, ...] | str | None = None
    """Class names in the order of the labels: a list, a text file, or `imagenet` (open_clip's). null: the names in the data."""
    templates: tuple[str, ...] | str | None = None
    """Sentences with a `{}`: a list, a text file, or `imagenet` (open_clip's 80). null: those in the data, else
    "a photo of a {}.".
    """
    metric: str | None = None
    """Metric that the task is judged by. null: the first of its kind."""
    group: Group | None = None
    """Groups of rows, for metrics that name the worst group. null: none."""
    chance: Share | None = None
    """Score of guessing. null: 1 / number of classes."""
    shift_of: str | None = None
    """Name of the task of which this task is a harder version. null: none."""
    published: dict[str, Share] = Field(default={})
    """Scores that others have published, by model."""
    prompt: str = "{}"
    """Sentence about the cue of an association, with a `{}`."""

    @property
    def judged_by(self) -> str:
        """Metric whose value is the score of the task."""
        return self.metric or METRICS[self.kind][0]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.judged_by not in METRICS[self.kind]:
            raise ValueError(f"{self.kind} is judged by {' or '.join(METRICS[self.kind])}, not {self.judged_by}")
        if self.judged_by.startswith("worst_group") and not self.group:
            raise ValueError(f"{self.judged_by} needs `group`, which divides the set into groups")
        if (self.source.format == "winogavil") != (self.kind == "association"):
            raise ValueError("an association is read from the format winogavil, and no other kind is")
        if self.kind in ("retrieval", "alignment") and (self.classes or self.templates):
            raise ValueError(f"{self.kind} has captions: leave classes and templates out")
        return self


class Suite(Section):
    """Tasks that a model is scored on."""

    about: str
    """Title of the suite's page."""
    root: Location
    """Folder or `s3://` prefix that the sources' `input` is relative to; `${NAME}` is an environment variable."""
    tasks: Annotated[tuple[Task, ...], Field(min_length=1)]
    """Tasks, in the order of the report."""
    average: bool = False
    """Mean over all tasks, given only where no task is absent."""
    published: dict[str, Share] = Field(default={})
    """Averages that others have published, by model."""

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [task.name for task in self.tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two tasks are called {twice[0]!r}: give each task a name of its own")
        if absent := [task for task in self.tasks if task.shift_of and task.shift_of not in names]:
            raise ValueError(f"{absent[0].name} is a shift of {absent[0].shift_of!r}, which is not in the suite")
        return self


def shipped() -> list[str]:
    """The names of the suites that come with nev."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in files("nev.eval.suite.shipped").iterdir() if _is_suite(entry.name)
    )


def load_suite(name: str, root: str | None = None) -> Suite:
    """Load a suite. name: a shipped suite, or a file (.yaml). root: takes the place of the suite's `root`.

    Raises ConfigError for an unknown name, a file that is no suite, and an environment variable in `root` that is not set.
    """
    if Path(name).stem == VALIDATION:
        raise ConfigError(f"{name}: a run's own page has the name {VALIDATION!r}. Rename the file.")
    if name.endswith((".yaml", ".yml")):
        suite = parse(Suite, read_yaml(name, f"The shipped suites are {', '.join(shipped())}."), where=name)
    elif name in shipped():
        suite = parse(Suite, read_yaml(str(files("nev.eval.suite.shipped").joinpath(f"{name}.yaml"))), where=name)
    else:
        raise ConfigError(
            f"no suite is called {name!r}: give one of {', '.join(shipped())}, or a file of your own (.yaml)"
        )
    try:
        place = root or Template(suite.root).substitute(os.environ)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"suite {name}: its data lies in {suite.root}, and {error} is not set. Set it, or name the folder with --data."
        ) from None
    return suite.model_copy(update={"root": absolute_location(place)})


def _is_suite(name: str) -> bool:
    return name.endswith(".yaml")

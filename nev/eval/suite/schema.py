"""A suite is data: which sets a model is tried on, how, and what others have published there. `suites/` has the usual ones."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from nev.config.base import ConfigError, Location, Section, Share
from nev.config.data import Columns
from nev.config.file import parse, read_yaml

Kind = Literal["zero_shot", "retrieval", "alignment", "robustness", "compression", "association"]
Format = Literal["clip-benchmark", "webdataset", "hf-parquet", "folder-classes", "folder-captions", "winogavil"]
# What a kind is judged by unless its task says otherwise, and what it may be judged by.
METRICS: dict[str, tuple[str, ...]] = {
    "zero_shot": ("top1", "top5", "mean_per_class", "worst_group_top1", "worst_group_top5", "macro_f1"),
    "retrieval": ("mean_recall_1", "text_to_image_r1", "image_to_text_r1"),
    "alignment": ("overlap",),
    "robustness": ("retained",),
    "compression": ("retained",),
    "association": ("jaccard",),
}


class DataSource(Section):
    """Where a task's pictures are. `input`: a folder, file or pattern, from the suite's `root` on where it is not absolute.

    `clip-benchmark` is a folder as CLIP_benchmark lays it out: tars in `test/`, and beside them `classnames.txt` and
    `zeroshot_classification_templates.txt`. `winogavil`: a `test.jsonl` of cue, candidates and associations, and `images/`.
    `share`: of the rows, drawn by their uids.
    """

    format: Format
    input: str
    columns: Columns = Columns()
    label_name: str | None = None
    share: Annotated[float, Field(gt=0, le=1)] = 1.0


class Group(Section):
    """What divides a set into parts whose worst counts: a column, JSON key or tar member `field` (npy: its number `place`).

    Rows of `leave_out` are in no part.
    """

    field: str
    place: int = Field(default=0, ge=0)
    leave_out: tuple[str, ...] = ()


class Task(Section):
    """One score. Tasks with one `source` share its embeddings.

    `classes`: names in the order of the labels, a text file of them, or `imagenet` (open_clip's). None: the data's own.
    `templates`: sentences with a `{}`, a text file of them, or `imagenet` (the 80 of open_clip's). None: the data's own, else
    "a photo of a {}.". `metric`: what the task is judged by; None: the kind's own. `chance`: what guessing scores, where it is
    not 1 / classes. `shift_of`: the task of which this is a harder version. `published`: model to its value. `prompt`: an
    association's sentence about its cue.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    kind: Kind
    source: DataSource
    classes: tuple[str, ...] | str | None = None
    templates: tuple[str, ...] | str | None = None
    metric: str | None = None
    group: Group | None = None
    chance: Share | None = None
    shift_of: str | None = None
    published: dict[str, Share] = Field(default={})
    prompt: str = "{}"

    @property
    def judged_by(self) -> str:
        """The metric that stands for the task."""
        return self.metric or METRICS[self.kind][0]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.judged_by not in METRICS[self.kind]:
            raise ValueError(f"{self.kind} is judged by {' or '.join(METRICS[self.kind])}, not {self.judged_by}")
        if self.judged_by.startswith("worst_group") and not self.group:
            raise ValueError(f"{self.judged_by} needs `group`, which tells the groups apart")
        if (self.source.format == "winogavil") != (self.kind == "association"):
            raise ValueError("an association is read from the format winogavil, and no other kind is")
        if self.kind in ("retrieval", "alignment") and (self.classes or self.templates):
            raise ValueError(f"{self.kind} has captions: leave classes and templates out")
        return self


class Suite(Section):
    """Tasks, in the order of the report. `average` is the published name of their mean, of which none may be absent.

    `root`: what the sources' `input` starts from; `${NAME}` is an environment variable.
    """

    about: str
    root: Location
    tasks: Annotated[tuple[Task, ...], Field(min_length=1)]
    average: bool = False
    published: dict[str, Share] = Field(default={})

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [task.name for task in self.tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two tasks are called {twice[0]!r}: names tell them apart in the results")
        if absent := [task for task in self.tasks if task.shift_of and task.shift_of not in names]:
            raise ValueError(f"{absent[0].name} is a shift of {absent[0].shift_of!r}, which is not in the suite")
        return self


def shipped() -> list[str]:
    """The names of the suites that come with nev."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in files("nev.eval.suite.shipped").iterdir() if _is_suite(entry.name)
    )


def load_suite(name: str, root: str | None = None) -> Suite:
    """A shipped suite by its name, or one of the user's by its file. `root` takes the place of its own.

    Raises ConfigError for an unknown name, a file that is no suite, and a variable in `root` that is not set.
    """
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
    if "://" not in place:
        place = str(Path(place).expanduser().absolute())
    return suite.model_copy(update={"root": place})


def _is_suite(name: str) -> bool:
    return name.endswith(".yaml")

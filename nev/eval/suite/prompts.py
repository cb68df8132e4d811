"""Class names and templates of a task: from the suite, from the data, or ImageNet's from open_clip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from nev.config.base import ConfigError
from nev.config.eval import IMAGENET
from nev.eval.suite import imagenet
from nev.eval.suite.collection import Fact
from nev.eval.suite.reading import Reading, read_lines, resolve_input
from nev.eval.suite.schema import Task

DEFAULT_TEMPLATES = ("a photo of a {}.",)


class Prompts(NamedTuple):
    """names: of the classes, in the order of their labels. templates: sentences with one `{}` for the name."""

    names: tuple[str, ...]
    templates: tuple[str, ...]


def load_prompts(task: Task, reading: Reading, facts: Sequence[Fact], labels: Sequence[int], root: str) -> Prompts:
    """The prompts of a task: the suite's, else the data's, else the default template.

    facts, labels: of each row. root: folder of the suite.
    Raises ConfigError where classes have no names, a label has no class, or a template has no `{}`.
    """
    names = _read_list(task.classes, root, imagenet.read_names) or reading.names or _names_in(facts, labels)
    templates = _read_list(task.templates, root, imagenet.read_templates) or reading.templates or DEFAULT_TEMPLATES
    for template in templates:
        if template.count("{}") != 1:
            raise ConfigError(f"a template needs exactly one '{{}}' for the class name: {template!r}")
    if labels and (most := max(labels)) >= len(names):
        raise ConfigError(
            f"label {most}, but there are {len(names)} classes (labels count from 0): give the classes of this set"
        )
    return Prompts(tuple(name.replace("_", " ") for name in names), templates)


def _read_list(
    setting: tuple[str, ...] | str | None, root: str, read_standard: Callable[[], tuple[str, ...]]
) -> tuple[str, ...] | None:
    """A list as it is, the lines of a file, or ImageNet's; None for null."""
    if setting is None or not isinstance(setting, str):
        return setting or None
    if setting == IMAGENET:
        return read_standard()
    location = resolve_input(setting, root)
    lines = read_lines(location)
    if lines is None:
        raise ConfigError(
            f"{location}: no such file; it needs a line for each class or template. ImageNet's are called {IMAGENET!r}"
        )
    return lines


def _names_in(facts: Sequence[Fact], labels: Sequence[int]) -> tuple[str, ...]:
    """The class names in the rows. Raises ConfigError where a label up to the highest has no name, or two names."""
    names: dict[int, str] = {}
    for fact, label in zip(facts, labels, strict=True):
        if fact.name and label >= 0 and names.setdefault(label, fact.name) != fact.name:
            raise ConfigError(
                f"label {label} is {fact.name!r} in row {fact.uid} and {names[label]!r} in an earlier row"
            )
    missing = sorted(set(range(max(labels, default=-1) + 1)) - names.keys())
    if missing or not names:
        raise ConfigError(
            f"the data names no class{f' for label {missing[0]}' if missing else ''}: give `classes` to the task"
        )
    return tuple(names[label] for label in sorted(names))

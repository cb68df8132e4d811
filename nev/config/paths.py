"""The locations in a configuration: they become absolute, and an output that would be lost is refused."""

from __future__ import annotations

from pathlib import Path

from nev.common.location import absolute_location, check_location
from nev.config.base import ConfigError
from nev.config.data import TrainSet
from nev.config.eval import IMAGENET
from nev.config.experiment import Experiment


def refuse_lost_output(output: str, option: str = "--set output=...") -> None:
    """Raise ConfigError for an `output` that nev cannot write to, or that would be lost. option: that gives another output."""
    check_location(output)
    if "://" in output:
        return
    if "working_dir_files" in Path.cwd().parts and not Path(output).expanduser().is_absolute():
        raise ConfigError(
            f"output = {output!r} is relative, and the folder of a submitted job is deleted with its node: give an absolute "
            f"folder that every node sees, or s3://BUCKET/PREFIX, with {option}"
        )


def absolute_sets(train: str | tuple[TrainSet, ...]) -> str | tuple[TrainSet, ...]:
    """The training set, or sets, with absolute paths."""
    if isinstance(train, str):
        return absolute_location(train)
    return tuple(each.model_copy(update={"path": absolute_location(each.path)}) for each in train)


def with_absolute_paths(config: Experiment) -> Experiment:
    """The experiment with absolute local paths, because Ray's processes have other working folders.

    Raises ConfigError for an `output` that would be lost or cannot be written.
    """
    refuse_lost_output(config.output)

    def absolute(path: str | None) -> str | None:
        return None if path is None else absolute_location(path)

    data = config.data.model_copy(update={"train": absolute_sets(config.data.train), "val": absolute(config.data.val)})
    data.refuse_equal_names()
    vision = config.vision
    if vision.weights and (Path(vision.weights).suffix or Path(vision.weights).expanduser().is_dir()):  # no package
        vision = vision.model_copy(update={"weights": absolute(vision.weights)})
    text, evaluation = config.text, config.eval
    if Path(text.encoder).expanduser().is_dir():  # else the name of a package, or a name on the hub
        text = text.model_copy(update={"encoder": absolute(text.encoder)})
    if (
        evaluation.zero_shot
        and isinstance(evaluation.zero_shot.classes, str)
        and evaluation.zero_shot.classes != IMAGENET
    ):
        zero_shot = evaluation.zero_shot.model_copy(update={"classes": absolute(evaluation.zero_shot.classes)})
        evaluation = evaluation.model_copy(update={"zero_shot": zero_shot})
    train = config.train.model_copy(update={"from_": absolute(config.train.from_)})
    changed = {
        "train": train,
        "data": data,
        "vision": vision,
        "text": text,
        "eval": evaluation,
        "output": absolute(config.output),
    }
    return config.model_copy(update=changed)

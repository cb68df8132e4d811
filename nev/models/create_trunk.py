"""A timm model by its name, its arguments, and the size of the pictures."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import timm

from nev.config.base import ConfigError
from nev.config.model import Vision

RESERVED_ARGUMENTS = ("num_classes", "global_pool", "img_size", "pretrained")  # set by nev, so refused in trunk_args
# What timm raises where a model cannot be built from its arguments.
BUILD_ERRORS = (TypeError, AssertionError, ArithmeticError, AttributeError, LookupError, ValueError)


def create_trunk(config: Vision, image_size: int) -> Any:
    """Create the timm model that `config` names, with random weights or timm's (`pretrained`, from the hub).

    Not every model takes the arguments that nev gives beside `trunk_args`; those that a model does not take are left out.
    Raises ConfigError for an unknown trunk or trunk argument (with close matches).
    """
    name, arguments = config.trunk, dict(config.trunk_args)
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        raise ConfigError(f"vision.trunk: timm has no model {name!r}{_suggest(name, timm.list_models())}")
    if reserved := sorted(set(arguments) & set(RESERVED_ARGUMENTS)):
        raise ConfigError(f"vision.trunk_args: {', '.join(reserved)} is set by nev itself; remove it")
    optional: dict[str, Any] = {"img_size": image_size, "global_pool": "", "num_classes": 0}
    if config.pool == "own":
        del optional["global_pool"]
    refusal: Exception | None = None
    # A class's signature does not say what it takes: some have the argument and refuse the value, some take any word.
    for taken in _list_choices(optional):
        try:
            return timm.create_model(name, pretrained=config.pretrained, **taken, **arguments)
        except OSError as error:
            raise ConfigError(
                f"vision.pretrained: timm's weights of {name!r} could not be fetched ({error}). Without the hub, "
                "give vision.weights a local file and set pretrained: false"
            ) from error
        except RuntimeError as error:  # of weights that do not fit, as other arguments would not make them
            raise ConfigError(_describe(config, image_size, error)) from error
        except BUILD_ERRORS as error:
            refusal = error
    assert refusal is not None
    raise ConfigError(_describe(config, image_size, refusal)) from refusal


def _list_choices(optional: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All subsets of the arguments, the larger ones first, and those without `num_classes` last: a classifier costs memory."""
    subsets = [names for count in range(len(optional), -1, -1) for names in combinations(optional, count)]
    for names in sorted(subsets, key=lambda names: "num_classes" not in names):
        yield {name: optional[name] for name in names}


def _describe(config: Vision, image_size: int, error: Exception) -> str:
    """The message for a model that timm does not build."""
    name, arguments = config.trunk, config.trunk_args
    if unknown := re.search(
        r"(?:(\w+)\.__init__\(\) )?got (?:an )?unexpected keyword argument(?:\(s\):)?(.*)", str(error)
    ):
        close = [
            f"{word!r}{_suggest(word, _list_arguments(name, unknown[1]))}"
            for word in re.findall(r"'(\w+)'", unknown[2])
            if word in arguments
        ]
        if close:
            return f"vision.trunk_args: {name!r} takes no argument {'; '.join(close)}"
    if (fixed := re.search(r"multiple values for keyword argument '(\w+)'", str(error))) and fixed[1] in arguments:
        return f"vision.trunk_args: timm's {name!r} sets {fixed[1]!r} itself: leave it out, or choose another trunk"
    tags = timm.list_pretrained(name.split(".")[0] + ".*")
    known = f". Its weights in timm: {', '.join(tags)}" if tags and (config.pretrained or "." in name) else ""
    size = f"{image_size} x {image_size} pixels"
    return f"vision.trunk {name!r} cannot be built with trunk_args {arguments} for pictures of {size}: {error}{known}"


def _suggest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f". Close: {', '.join(close)}" if close else ""


def _list_arguments(model: str, owner: str | None) -> list[str]:
    """Argument names of the class `owner` of a timm model."""
    module = sys.modules[timm.model_entrypoint(model.split(".")[0]).__module__]
    return list(inspect.signature(getattr(module, owner)).parameters) if owner and hasattr(module, owner) else []

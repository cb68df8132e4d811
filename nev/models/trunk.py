"""The trunk: a timm model that turns pixels into tokens, and its weights."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Sequence
from typing import Any

import timm
from torch import Tensor, nn

from nev.common.errors import first_few
from nev.config.base import ConfigError
from nev.config.model import Vision
from nev.models.nomic import match_released

RESERVED_ARGUMENTS = ("num_classes", "global_pool", "img_size", "pretrained")  # set by nev, so refused in trunk_args
CLASSIFIER_PARTS = ("head", "attn_pool", "fc_norm", "norm_head", "conv_head")  # of timm, after its tokens


def build_trunk(config: Vision, image_size: int) -> Any:
    """Build the timm model that `config` describes, with random weights or timm's (`pretrained`, from the hub).

    Parts behind the tokens are removed, but for the pool `own`, which needs them. With the pool `nomic` an EVA-02 trunk is
    changed to the released blocks (`match_released`).

    Raises ConfigError for an unknown trunk or trunk argument (with close matches).
    """
    trunk = _create_trunk(config, image_size)
    if config.pool != "own":
        used = type(trunk).forward_features.__code__.co_names
        for part in CLASSIFIER_PARTS:  # DDP would wait for parameters that no loss reaches
            module = getattr(trunk, part, None)
            if part not in used and isinstance(module, nn.Module) and any(True for _ in module.parameters()):
                setattr(trunk, part, nn.Identity())
    if not config.final_norm:
        if not isinstance(getattr(trunk, "norm", None), nn.Module):
            raise ConfigError(f"vision.final_norm: false, but trunk {config.trunk!r} has no last norm: leave it true")
        trunk.norm = nn.Identity()
    if config.pool == "nomic":
        match_released(trunk)
    return trunk


def encode_images(trunk: Any, images: Tensor, pool: str, name: str) -> Tensor:
    """float [b, 3, H, W] -> the trunk's tokens [b, T, D], or with the pool `own` its vector [b, D].

    A feature map becomes tokens row by row. Raises ConfigError for a trunk that gives something else. name: of the trunk.
    """
    if pool == "own":
        features = trunk(images)
        wanted, shape = 2, "a vector [b, D]"
    else:
        features = trunk.forward_features(images)
        wanted, shape = 3, "tokens [b, T, D]"
        if isinstance(features, Tensor) and features.ndim == 4:
            channels_last = str(getattr(trunk, "output_fmt", "NCHW")).endswith("NHWC")
            features = features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
    if not isinstance(features, Tensor) or features.ndim != wanted:
        given = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ConfigError(
            f"vision.trunk {name!r} gives {given}, not {shape}: choose another trunk, or another vision.pool"
        )
    return features


def _create_trunk(config: Vision, image_size: int) -> Any:
    name, arguments = config.trunk, dict(config.trunk_args)
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        raise ConfigError(f"vision.trunk: timm has no model {name!r}{_suggest(name, timm.list_models())}")
    if reserved := sorted(set(arguments) & set(RESERVED_ARGUMENTS)):
        raise ConfigError(f"vision.trunk_args: {', '.join(reserved)} is set by nev itself; remove it")
    optional: dict[str, Any] = {"img_size": image_size}  # not every model has these arguments
    if config.pool != "own":
        optional["global_pool"] = ""
    while True:
        try:
            return timm.create_model(name, pretrained=config.pretrained, num_classes=0, **optional, **arguments)
        except TypeError as error:
            refused = re.search(r"(?:(\w+)\.__init__\(\) )?got an unexpected keyword argument '(\w+)'", str(error))
            if refused and refused[2] in optional:
                del optional[refused[2]]
                continue
            if refused and refused[2] in arguments:
                close = _suggest(refused[2], _list_arguments(name, refused[1]))
                raise ConfigError(f"vision.trunk_args: {name!r} takes no argument {refused[2]!r}{close}") from error
            raise ConfigError(f"vision.trunk {name!r} cannot be built with trunk_args {arguments}: {error}") from error
        except OSError as error:
            raise ConfigError(
                f"vision.pretrained: timm's weights of {name!r} could not be fetched ({error}). Without the hub, "
                "give vision.weights a local file and set pretrained: false"
            ) from error
        except (AssertionError, ArithmeticError, LookupError, RuntimeError, ValueError) as error:
            tags = timm.list_pretrained(name.split(".")[0] + ".*")
            known = f". Its weights in timm: {', '.join(tags)}" if tags and (config.pretrained or "." in name) else ""
            raise ConfigError(
                f"vision.trunk {name!r} cannot be built with trunk_args {arguments}: {error}{known}"
            ) from error


def _suggest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f". Close: {', '.join(close)}" if close else ""


def _list_arguments(model: str, owner: str | None) -> list[str]:
    """Argument names of the class `owner` of a timm model."""
    module = sys.modules[timm.model_entrypoint(model.split(".")[0]).__module__]
    return list(inspect.signature(getattr(module, owner)).parameters) if owner and hasattr(module, owner) else []


def fit_trunk_weights(trunk: Any, state: dict[str, Tensor], config: Vision) -> dict[str, Tensor]:
    """The tensors of a file by the trunk's names. timm resamples position and patch embeddings.

    Raises ConfigError unless every parameter of the trunk is there, and nothing more but the trunk's classifier.
    """
    convert = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    try:
        state = convert(state, trunk) if convert else state
    except (RuntimeError, KeyError, AttributeError, AssertionError, ValueError) as error:
        raise ConfigError(f"vision.weights {config.weights} does not fit trunk {config.trunk!r}: {error}") from error
    last_norm = () if config.final_norm else ("norm",)  # the trunk here has none
    droppable = ("mask_token", "lm_head", *CLASSIFIER_PARTS, *_classifiers(trunk), *last_norm)
    expected = trunk.state_dict()
    state = {key: value for key, value in state.items() if key in expected or not _under(key, droppable)}
    refuse_misfit(state, expected, f"trunk {config.trunk!r} with trunk_args {config.trunk_args}", config)
    return state


def refuse_misfit(state: dict[str, Tensor], expected: dict[str, Tensor], what: str, config: Vision) -> None:
    """Raise ConfigError, with names, unless `state` has exactly the tensors of `expected`. what: whose these are."""
    shapes = {key: (tuple(state[key].shape), tuple(expected[key].shape)) for key in state.keys() & expected.keys()}
    wrong = {
        "missing in the file": [key for key in expected if key not in state],
        "not in the model": [key for key in state if key not in expected],
        "of another shape": [
            f"{key} {there} for {here}" for key, (there, here) in sorted(shapes.items()) if there != here
        ],
    }
    if lines := [f"\n  {kind}: {first_few(names)}" for kind, names in wrong.items() if names]:
        raise ConfigError(f"vision.weights {config.weights} does not fit {what}{''.join(lines)}")


def _classifiers(trunk: Any) -> tuple[str, ...]:
    names = (getattr(trunk, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _under(key: str, parts: Sequence[str]) -> bool:
    return any(key == part or key.startswith(part + ".") for part in parts)

"""The trunk: a timm model that turns pixels into tokens, and its weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from nev.common.errors import first_few
from nev.config.base import ConfigError
from nev.config.model import Vision
from nev.models.create_trunk import create_trunk
from nev.models.nomic import match_released
from nev.models.trunk_trace import trace_trunk

# What files of weights have beside the trunk, by timm's names. What the trunk here has of these is loaded.
CLASSIFIER_PARTS = ("head", "attn_pool", "fc_norm", "norm_head", "conv_head")


def build_trunk(config: Vision, image_size: int) -> Any:
    """Build the timm model that `config` describes, with random weights or timm's (`pretrained`, from the hub).

    Parts of the trunk that no token depends on are removed: `trunk.removed` has their names. `trunk.output_shape` is the shape of
    the tokens of a picture, (T, D), or with the pool `own` of the vector, (D,). With the pool `nomic` an EVA-02 trunk is changed
    to the released blocks (`match_released`).

    Raises ConfigError for an unknown trunk or trunk argument (with close matches), and for a trunk that takes no pictures of this
    size or has no output that the pool can read.
    """
    trunk = create_trunk(config, image_size)
    if not config.final_norm:
        if not isinstance(getattr(trunk, "norm", None), nn.Module):
            raise ConfigError(f"vision.final_norm: false, but trunk {config.trunk!r} has no last norm: leave it true")
        trunk.norm = nn.Identity()
    if config.pool == "nomic":
        match_released(trunk)
    trace = trace_trunk(trunk, image_size, config.pool, config.trunk)
    trunk.removed, trunk.output_shape = _remove_idle_parts(trunk, trace.idle), trace.shape
    return trunk


def _remove_idle_parts(trunk: Any, idle: Sequence[str]) -> tuple[str, ...]:
    """Put an Identity in the place of each child of the trunk whose parameters are all idle. Returns the names of these.

    DDP would wait for parameters that no loss reaches. idle: names of parameters.
    """
    names = set(idle)
    removed = []
    for part, module in list(trunk.named_children()):
        parameters = [f"{part}.{name}" for name, _ in module.named_parameters()]
        if parameters and names.issuperset(parameters):
            setattr(trunk, part, nn.Identity())
            removed.append(part)
    return tuple(removed)


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
    droppable = ("mask_token", "lm_head", *CLASSIFIER_PARTS, *trunk.removed, *_classifiers(trunk), *last_norm)
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

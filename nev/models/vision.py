"""The vision tower: a timm trunk that gives tokens, a pooling head, unit vectors of the text tower's width.

    images [b, 3, H, W] -> trunk.forward_features -> tokens [b, T, D] -> head -> [b, D] -> (projection) -> L2, fp32

The paper's tower (arXiv 2406.18587) is `eva02_base_patch14_224.mim_in22k` with 16 px patches, without its last norm,
under the head `nomic`; its D is the text width, 768, and there is no projection.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
import sys
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nev.common.errors import first_few
from nev.config.base import ConfigError
from nev.config.model import Vision
from nev.models import nomic
from nev.models.heads import build_head
from nev.models.weights import read_weights
from nev.ops.onednn import use_onednn

RESERVED_ARGUMENTS = ("num_classes", "global_pool", "img_size", "pretrained")  # set by nev, so refused in trunk_args
CLASSIFIER_PARTS = ("head", "attn_pool", "fc_norm", "norm_head", "conv_head")  # of timm, never called here


class VisionTower(nn.Module):
    """Pixels to unit vectors. `build_vision` builds one.

    trunk: timm model.
    head: tokens to one vector.
    projection: Linear without bias; Identity where trunk and text have the same width.
    width: width of the embedding.
    name: the trunk, as in the config, for messages.
    """

    def __init__(self, trunk: Any, head: nn.Module, width: int, name: str) -> None:
        super().__init__()
        self.trunk, self.head, self.width, self.name = trunk, head, width, name
        dim = int(trunk.num_features)
        self.projection: nn.Module = nn.Identity()
        if dim != width:
            self.projection = nn.Linear(dim, width, bias=False)
            nn.init.normal_(self.projection.weight, std=dim**-0.5)

    def tokens(self, images: Tensor) -> Tensor:
        """float [b, 3, H, W] -> the trunk's tokens [b, T, D]. A feature map becomes tokens row by row.

        Raises ConfigError for a trunk that gives neither tokens nor a feature map.
        """
        features = self.trunk.forward_features(images)
        if isinstance(features, Tensor) and features.ndim == 4:
            channels_last = str(getattr(self.trunk, "output_fmt", "NCHW")).endswith("NHWC")
            features = features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
        if not isinstance(features, Tensor) or features.ndim != 3:
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ConfigError(f"vision.trunk {self.name!r} gives {shape}, not tokens [b, T, D]: choose another trunk")
        return features

    def features(self, images: Tensor) -> Tensor:
        """float [b, 3, H, W] -> the embedding before its scaling to unit length, [b, width]."""
        pooled: Tensor = self.projection(self.head(self.tokens(images)))
        return pooled

    def forward(self, images: Tensor) -> Tensor:
        """float [b, 3, H, W] -> float32 [b, width] of unit length. The norm is computed in fp32, under autocast too."""
        return F.normalize(self.features(images).float(), dim=-1)


def build_vision(config: Vision, image_size: int, width: int) -> VisionTower:
    """Build the tower that `config` describes, for square images of `image_size` pixels and text vectors of width `width`.

    Weights are random, or timm's (`pretrained`, from the hub), or of the trunk from a file (`weights`: timm resamples position
    and patch embeddings to this size), or of the whole tower from a checkpoint of nev. With the head `nomic` an EVA-02 trunk is
    changed to the released blocks (`nomic.match_released`). On CPUs where oneDNN is faster, linear layers compute through it
    (`onednn.use_onednn`), with the same parameters and names.

    Raises ConfigError for an unknown trunk or trunk argument (with close matches), for weights that do not fit, and for a head
    that the trunk cannot feed.
    """
    tower = _assemble(config, image_size, width)
    if config.weights:
        tower.load_state_dict(read_tower_weights(tower, config), strict=False)  # checked when they were read
    use_onednn(tower)
    return tower


def check_vision(config: Vision, image_size: int, width: int, locked: bool = False) -> None:
    """Raise the errors of `build_vision`, but in a second: no weight is made, and no hub is contacted.

    locked: the tower will be locked. Then raise ConfigError for parameters that neither `weights` nor `pretrained` brings.
    """
    with torch.device("meta"):
        tower = _assemble(config.model_copy(update={"pretrained": False}), image_size, width)
    names = [name for name, _ in tower.named_parameters()]
    trunk = {name for name in names if name.startswith("trunk.")}
    loaded = read_tower_weights(tower, config) if config.weights else trunk
    if locked and (rest := [name for name in names if name not in loaded]):
        source = "weights" if config.weights else "pretrained"
        raise ConfigError(
            f"lock: image would lock random weights: vision.{source} brings the trunk's alone, and the tower has "
            f"{first_few(rest)} besides. Give vision.weights a whole tower (the model.safetensors of a checkpoint of nev), or "
            "choose vision.pool: mean or cls on a trunk as wide as the texts."
        )


def _assemble(config: Vision, image_size: int, width: int) -> VisionTower:
    """The tower, before the weights of a file are loaded."""
    trunk = _create_trunk(config, image_size)
    for part in CLASSIFIER_PARTS:  # DDP would wait for parameters that no loss reaches
        module = getattr(trunk, part, None)
        if isinstance(module, nn.Module) and any(True for _ in module.parameters()):
            setattr(trunk, part, nn.Identity())
    if not config.final_norm:
        if not isinstance(getattr(trunk, "norm", None), nn.Module):
            raise ConfigError(f"vision.final_norm: false, but trunk {config.trunk!r} has no last norm: leave it true")
        trunk.norm = nn.Identity()
    if config.pool == "nomic":
        nomic.match_released(trunk)
    return VisionTower(trunk, build_head(config, trunk), width, config.trunk)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [b, H, W, 3] -> float32 [b, 3, H, W] = (images / 255 - mean) / std, on the images' device.

    mean, std: one number per channel, in 0 to 1.

    Pixels become floats nowhere else: they travel to the device as uint8. The result keeps the memory order of the pixels
    (channels last). Raises ValueError for another shape or dtype.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"normalise needs uint8 [b, H, W, 3], not {images.dtype} {tuple(images.shape)}")
    offset, scale = _channels(tuple(mean), tuple(std), images.device)
    return torch.addcmul(offset, images.permute(0, 3, 1, 2), scale)


@functools.lru_cache(maxsize=8)
def _channels(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Offset and scale, float32 [3, 1, 1] each. Cached, because a copy to the device waits for the device."""
    offset = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device).view(3, 1, 1)
    scale = torch.tensor([1 / (255 * s) for s in std], device=device).view(3, 1, 1)
    return offset, scale


def _create_trunk(config: Vision, image_size: int) -> Any:
    name, arguments = config.trunk, dict(config.trunk_args)
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        raise ConfigError(f"vision.trunk: timm has no model {name!r}{_suggest(name, timm.list_models())}")
    if reserved := sorted(set(arguments) & set(RESERVED_ARGUMENTS)):
        raise ConfigError(f"vision.trunk_args: {', '.join(reserved)} is set by nev itself; remove it")
    optional: dict[str, Any] = {"global_pool": "", "img_size": image_size}  # not every model has these arguments
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


def read_tower_weights(tower: VisionTower, config: Vision) -> dict[str, Tensor]:
    """Read the weights of the trunk, or of the whole tower, from the file `config.weights`, by the tower's names.

    Raises ConfigError unless the file has every parameter of the trunk (or tower), and nothing more but the trunk's classifier.
    """
    state = read_weights(str(config.weights))
    if any(name.startswith("vision.trunk.") for name in state):  # the model of a checkpoint of nev
        state = {name.removeprefix("vision."): tensor for name, tensor in state.items() if name.startswith("vision.")}
        _refuse_misfit(state, tower.state_dict(), f"the tower of this experiment ({config.trunk!r})", config)
        return state
    return {f"trunk.{name}": tensor for name, tensor in _trunk_weights(tower.trunk, state, config).items()}


def _trunk_weights(trunk: Any, state: dict[str, Tensor], config: Vision) -> dict[str, Tensor]:
    if nomic.RELEASED_MARK in state:
        raise ConfigError(
            f"vision.weights {config.weights}: this is a whole tower in nomic-embed-vision's released layout, not a "
            "trunk. Build the tower without weights and use nev.models.nomic.load_released"
        )
    convert = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    try:
        state = convert(state, trunk) if convert else state
    except (RuntimeError, KeyError, AttributeError, AssertionError, ValueError) as error:
        raise ConfigError(f"vision.weights {config.weights} does not fit trunk {config.trunk!r}: {error}") from error
    last_norm = () if config.final_norm else ("norm",)  # the trunk here has none
    droppable = ("mask_token", "lm_head", *CLASSIFIER_PARTS, *_classifiers(trunk), *last_norm)
    expected = trunk.state_dict()
    state = {key: value for key, value in state.items() if key in expected or not _under(key, droppable)}
    _refuse_misfit(state, expected, f"trunk {config.trunk!r} with trunk_args {config.trunk_args}", config)
    return state


def _refuse_misfit(state: dict[str, Tensor], expected: dict[str, Tensor], what: str, config: Vision) -> None:
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

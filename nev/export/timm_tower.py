"""A vision tower without nev's code: transformers' wrapper of a timm model, and linear layers behind it.

Not every tower can be expressed so. timm has to build the same tensors from a name and arguments, with its own pooling in the
place of nev's; whether it also computes the same vectors, the caller has to find out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import TimmWrapperConfig, TimmWrapperModel

from nev.config.model import Vision
from nev.config.model_spec import ModelSpec
from nev.models.frozen import LEAST_DEVIATION
from nev.models.heads import MlpHead
from nev.models.image_encoder import ImageEncoder

POOLS = {"own": {}, "cls": {"global_pool": "token"}, "mean": {"global_pool": "avg"}, "map": {"global_pool": "map"}}
# What timm raises where a model cannot be built from arguments, or has other tensors.
ERRORS = (TypeError, AssertionError, ArithmeticError, AttributeError, LookupError, RuntimeError, ValueError)


class Linear(NamedTuple):
    """A linear layer of the head.

    name: in `ImageEncoder`. weight: float32 [out, in]. bias: float32 [out], or None. gelu: whether GELU follows.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    gelu: bool


def wrap_trunk(encoder: ImageEncoder, spec: ModelSpec) -> TimmWrapperModel | None:
    """The trunk and pool as a model of transformers, whose `pooler_output` the head takes. None where timm has no such model."""
    config = spec.vision
    if config.pool not in POOLS or config.head == "swiglu" or config.keep == "tokens" or config.precision != "fp32":
        return None
    state = {**encoder.trunk.state_dict(), **encoder.pool.state_dict(prefix="attn_pool.")}
    # A trunk of the hub or of a folder is built by the name of its architecture, which asks neither.
    name = encoder.trunk.pretrained_cfg["architecture"] if ":" in config.trunk else config.trunk
    described: Any = {"num_features": int(encoder.trunk.num_features), "num_labels": 0, "dtype": "float32"}
    for size in ({"img_size": spec.image_size}, {}):  # not every model has this argument
        arguments = {**config.trunk_args, **_pool_arguments(encoder, config), **size}
        try:
            wrapper = TimmWrapperModel(TimmWrapperConfig(architecture=name, model_args=arguments, **described))
            wrapper.timm_model.load_state_dict(state)
        except ERRORS:
            continue
        return wrapper
    return None


def _pool_arguments(encoder: ImageEncoder, config: Vision) -> dict[str, Any]:
    """Arguments of timm for the pool: the last norm before it, as nev has it, and all tokens for the pool `map`."""
    arguments: dict[str, Any] = dict(POOLS[config.pool])
    if isinstance(encoder.trunk, VisionTransformer):
        last_norm = "final_norm"
        arguments |= {"fc_norm": False, "pool_include_prefix": config.pool == "map"}
    elif isinstance(encoder.trunk, Eva):
        last_norm = "use_post_transformer_norm"
        arguments |= {"use_fc_norm": False}
        if config.pool == "map":
            pool: Any = encoder.pool
            hidden, width = pool.mlp.fc1.weight.shape
            # timm truncates width * ratio: with 0.5 added the result is exactly `hidden`.
            arguments |= {"attn_pool_num_heads": pool.num_heads, "attn_pool_mlp_ratio": (hidden + 0.5) / width}
    else:
        return arguments
    arguments = arguments if config.pool != "own" else {}
    return arguments if config.final_norm else {**arguments, last_norm: False}


def list_linears(encoder: ImageEncoder) -> list[Linear]:
    """The layers of a head `linear` or `mlp`, on the CPU. The first takes features that are not standardised."""
    layers = [(name, part) for name, part in encoder.head.named_modules(prefix="head") if isinstance(part, nn.Linear)]
    gelu = isinstance(encoder.head, MlpHead)
    linears = [
        Linear(
            name,
            layer.weight.cpu(),
            None if layer.bias is None else layer.bias.cpu(),
            gelu and layer is not layers[-1][1],
        )
        for name, layer in layers
    ]
    if encoder.statistics is not None:
        linears[0] = fold_statistics(linears[0], encoder.statistics.cpu())
    return linears


def fold_statistics(layer: Linear, statistics: Tensor) -> Linear:
    """The layer that computes from features what `layer` computes from standardised features. statistics: [2, F]."""
    mean, deviation = statistics.double().unbind()
    weight = torch.where(deviation > LEAST_DEVIATION, layer.weight / deviation, 0.0)
    shift = -weight @ mean
    return layer._replace(weight=weight.float(), bias=(shift if layer.bias is None else layer.bias + shift).float())

"""The released nomic-embed-vision, as its folder lies on the hub.

The folder is recognised by the names of its tensors: its config.json has the `model_type` of the text model. Sizes are read from
the tensors, so a model of another size in the same layout opens, too.
"""

from __future__ import annotations

import json
import re
from math import isqrt
from pathlib import Path
from typing import Any

import safetensors
import torch
import yaml
from torch import Tensor

from nev.config.base import ConfigError
from nev.config.model import Text, Vision
from nev.config.model_spec import ModelError, ModelSpec
from nev.models.image_encoder import ImageEncoder, build_image_encoder
from nev.models.nomic import RELEASED_MARK, from_released
from nev.models.prompts import list_prompts
from nev.models.weights import FOLDER_FILES, read_weights

CONFIG, PROCESSOR, CARD = "config.json", "preprocessor_config.json", "README.md"
FIRST, LATEST = "nomic-embed-vision-v1", "nomic-embed-vision-v1.5"  # the published models
TRUNK = "eva02_base_patch14_224"  # timm's architecture, of which all sizes are arguments
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# What nev's tower computes. A config.json that says something else is of another model, even where the tensors fit.
COMPUTED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("swiglu",),
    "prenorm": (True,),
    "layer_norm_epsilon": (1e-6,),
    "use_rotary_pos_emb": (True,),
    "rotary_emb_fraction": (0,),
    "use_rms_norm": (False, None),
    "parallel_block": (False,),
    "causal": (False,),
    "global_pool": (None,),
}
LOGIT_SCALE = 100.0  # not in the released files; CLIP's bound, where training ends up


def find_released(folder: Path) -> Path | None:
    """The file of weights in the released layout; None for a folder without one. Only names of tensors are read."""
    for file in (folder / name for name in FOLDER_FILES):
        if file.is_file() and RELEASED_MARK in _tensor_names(file):
            return file
    return None


def _tensor_names(file: Path) -> set[str]:
    try:
        if file.suffix == ".safetensors":
            with safetensors.safe_open(file, "pt") as tensors:
                return set(tensors.keys())
        return set(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:  # safetensors, pickle, zip and I/O each raise their own
        raise ModelError(f"{file}: not readable as weights ({error}). Copy or download the model again.") from error


def read_released(file: Path, name: str) -> tuple[ModelSpec, ImageEncoder]:
    """Read released weights: what they are, and the encoder, on the CPU. name: of the model, as `find_version` takes it.

    Raises ModelError where tensors or config.json are missing, do not fit one another, or are of another model.
    """
    try:
        weights = read_weights(file)
        state = from_released(weights)
        spec = describe_released(weights, file.parent, name)
        encoder = build_image_encoder(spec.vision, spec.image_size, spec.width)
        encoder.load_state_dict(state)
    except (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError) as error:
        raise ModelError(f"{file} is not a whole nomic-embed-vision: {error}") from error
    return spec, encoder


def describe_released(weights: dict[str, Tensor], folder: Path, name: str) -> ModelSpec:
    """What released weights are, by the shapes of the tensors, config.json and preprocessor_config.json.

    name: of the model. Where neither the name nor the folder tells the version, LATEST is assumed.
    """
    config, pixels = _read_json(folder / CONFIG), _read_json(folder / PROCESSOR)
    width = weights["embeddings.cls_token"].shape[-1]
    depth = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("layers."))
    patch = isqrt(weights["embeddings.proj.weight"].shape[1] // 3)
    side = isqrt(weights["embeddings.pos_embed"].shape[1] - 1)
    hidden = weights["layers.0.mlp.fc11.weight"].shape[0]
    _check_config(config, {"n_embd": width, "n_layer": depth, "patch_size": patch, "img_size": side * patch})
    heads, reference, ratio = int(config["n_head"]), config.get("ref_feat_shape") or side, hidden / width
    vision = Vision(
        trunk=TRUNK,
        trunk_args={
            "patch_size": patch,
            "embed_dim": width,
            "depth": depth,
            "num_heads": heads,
            "mlp_ratio": ratio if int(width * ratio) == hidden else (hidden + 0.5) / width,  # timm rounds down
            "ref_feat_shape": [reference] * 2 if isinstance(reference, int) else list(reference),
        },
        final_norm=False,
        pool="nomic",
        pool_heads=heads,
        pool_hidden=weights["selector.mlp.fc11.weight"].shape[0],
    )
    first = find_version(folder, name) == FIRST
    encoder = "nomic-ai/nomic-embed-text-v1" if first else "nomic-ai/nomic-embed-text-v1.5"
    text = Text(encoder=encoder, prefix="search_query: ", pooling="mean", layer_norm=not first)
    return ModelSpec(
        name=name,
        vision=vision,
        image_size=side * patch,
        mean=tuple(pixels.get("image_mean") or CLIP_MEAN),
        std=tuple(pixels.get("image_std") or CLIP_STD),
        width=width,
        text=text,
        prompts=list_prompts(text.prefix),
        logit_scale=LOGIT_SCALE,
    )


def find_version(folder: Path, name: str) -> str | None:
    """The published model that a folder is a copy of: FIRST or LATEST; None where nothing tells.

    Tensors and config.json of both are alike. A name tells them apart: of the folder, on the hub, in the hub's cache, as
    `_name_or_path` in config.json, as `base_model` or heading of the model card.
    name: of the model, `nomic-embed-vision-v1` or `OWNER/nomic-embed-vision-v1`.
    """
    cached = [part for part in folder.parts if part.startswith("models--")]
    for text in (name, *cached, _read_json(folder / CONFIG).get("_name_or_path"), *_read_card(folder / CARD)):
        last = re.split("/|--", str(text).rstrip("/"))[-1]
        if last in (FIRST, LATEST):
            return last
    return None


def _read_card(file: Path) -> list[str]:
    """The base models and the first heading of a model card. Empty where there is no card."""
    if not file.is_file():
        return []
    card = file.read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    try:
        facts = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        facts = None
    base = facts.get("base_model") if isinstance(facts, dict) else None
    heading = re.search(r"^# +([\w.-]+)", card[front.end() if front else 0 :], re.MULTILINE)
    return [*map(str, base if isinstance(base, list) else [base]), *([heading[1]] if heading else [])]


def _check_config(config: dict[str, Any], sizes: dict[str, int]) -> None:
    """Raise ConfigError for a config.json that is absent, or that is not of these weights. sizes: of the tensors."""
    if "n_head" not in config:
        raise ConfigError(f"{CONFIG} with n_head is missing, and the tensors do not tell the number of attention heads")
    wrong = [
        f"{key} {config[key]!r}" for key, allowed in COMPUTED.items() if key in config and config[key] not in allowed
    ]
    wrong += [f"{key} {config[key]!r} for {size}" for key, size in sizes.items() if config.get(key, size) != size]
    if wrong:
        raise ConfigError(f"its {CONFIG} has {', '.join(wrong)}: it is of another model than the weights")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{file}: damaged ({error})") from error
    return raw if isinstance(raw, dict) else {}

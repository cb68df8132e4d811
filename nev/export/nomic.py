"""The format `nomic`: the vision tower in the layout of the released nomic-embed-vision, for those who have its code.

The layout has no text tower. nev.json names the text encoder, and `nev.load(..., text=...)` finds it elsewhere.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from nev.config.model_spec import ModelError
from nev.export.card import write_card
from nev.export.parts import (
    Check,
    Options,
    compare,
    embed_squares,
    picture_limit,
    sample_pictures,
    write_spec,
)
from nev.inference.forward import make_embedder
from nev.inference.model import Model
from nev.inference.released import CONFIG, read_released
from nev.models.nomic import to_released
from nev.models.nomic_text import MLP_MULTIPLE, MODEL_TYPE

WEIGHTS = "model.safetensors"
RELEASED_CODE = "nomic-ai/nomic-bert-2048--"  # repository on the hub that has the released code
# The released config.json, but for sizes. The released code has no defaults for most of these.
RELEASED: dict[str, Any] = {
    "model_type": MODEL_TYPE,
    "architectures": ["NomicVisionModel"],
    "auto_map": {
        "AutoConfig": f"{RELEASED_CODE}configuration_hf_nomic_bert.NomicBertConfig",
        "AutoModel": f"{RELEASED_CODE}modeling_hf_nomic_bert.NomicVisionModel",
    },
    "activation_function": "swiglu",
    "attn_pdrop": 0.0,
    "bos_token_id": None,
    "causal": False,
    "drop_path_rate": 0.0,
    "embd_pdrop": 0.0,
    "eos_token_id": None,
    "fused_bias_fc": True,
    "fused_dropout_add_ln": True,
    "global_pool": None,
    "hidden_features_scaling_factor": 1.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-6,
    "layer_scale": False,
    "layer_scale_init": 1.0,
    "learned_pos_embedding": False,
    "mask_token": False,
    "mlp_fc1_bias": True,
    "mlp_fc2_bias": True,
    "n_positions": 0,
    "no_cls_token": False,
    "no_embed_class": False,
    "no_last_ln": True,
    "norm_mlp": True,
    "num_channels": 3,
    "parallel_block": False,
    "parallel_block_tied_norm": False,
    "patch_dropout": 0,
    "patch_embed_bias": True,
    "prenorm": True,
    "prepre_layernom": False,  # as it is spelt there
    "qkv_proj_bias": True,
    "register_tokens": 0,
    "resid_pdrop": 0.0,
    "rotary_emb_fraction": 0.0,
    "sinusoidal_pos_embedding": False,
    "tie_word_embeddings": False,
    "use_flash_attn": True,
    "use_pos_embed": True,
    "use_rms_norm": False,
    "use_rotary_pos_emb": True,
    "vocab_size": 0,
}


def write(model: Model, folder: Path, options: Options) -> list[Check]:
    """Write the folder, and compare what its tensors and config.json compute.

    Raises ModelError for a tower that the released layout or its code cannot hold.
    """
    try:
        tensors = to_released(model.vision.state_dict())
    except ValueError as error:
        raise ModelError(
            f"format nomic holds EVA-02 towers with nomic's pool alone, and {model.spec.name} is another: give the format hf. "
            f"{error}"
        ) from error
    config = describe_sizes(model.vision, tensors)
    save_file(
        {name: tensor.contiguous().cpu() for name, tensor in tensors.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    (folder / CONFIG).write_text(json.dumps({**RELEASED, **config}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_processor(model, folder)
    write_spec(model, folder, {}, None)
    write_card(model, folder, "nomic", replace(options, text=False))
    spec, encoder = read_released(folder / WEIGHTS, model.spec.name)
    squares = sample_pictures(model.spec.image_size)
    vectors = make_embedder(encoder.to(model.device), spec.mean, spec.std, model.device)(squares)
    return [compare("nev.load", "pictures", np.asarray(vectors), embed_squares(model, squares), picture_limit(model))]


def describe_sizes(vision: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The sizes in config.json of a tower whose released tensors are `tensors`.

    Raises ModelError for sizes that this config cannot tell, or that the released code would change.
    """
    block, pool, rope = vision.trunk.blocks[0], vision.pool, vision.trunk.rope
    width, hidden = tensors["layers.0.mlp.fc2.weight"].shape
    pooled = tensors["selector.mlp.fc2.weight"].shape[1]
    patch = vision.trunk.patch_embed.patch_size[0]
    wrong = []
    if pool.heads != block.attn.num_heads:
        wrong.append(f"its trunk has {block.attn.num_heads} attention heads and its pool {pool.heads}")
    if pooled != hidden:
        wrong.append(f"the MLP of its blocks is {hidden} wide and that of its pool {pooled}")
    if hidden % MLP_MULTIPLE:
        wrong.append(f"its MLP is {hidden} wide, which the released code rounds up to a multiple of {MLP_MULTIPLE}")
    if wrong:
        raise ModelError(
            f"format nomic: {'; '.join(wrong)}. Its config.json has one number for both. Use the format hf."
        )
    return {
        "n_embd": width,
        "n_head": block.attn.num_heads,
        "n_inner": hidden,
        "n_layer": len(vision.trunk.blocks),
        "img_size": vision.trunk.patch_embed.img_size[0],
        "patch_size": patch,
        "ref_feat_shape": list(rope.ref_feat_shape) if rope and rope.ref_feat_shape else None,
    }


def write_processor(model: Model, folder: Path) -> None:
    """Write the image processor that the released model has, with the model's own numbers."""
    from transformers import CLIPImageProcessor

    size, mean, std = model.spec.image_size, model.spec.mean, model.spec.std
    square = {"height": size, "width": size}
    processor = CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size=square, image_mean=list(mean), image_std=list(std)
    )
    processor.save_pretrained(folder)

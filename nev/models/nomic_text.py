"""The config of a released nomic-embed-text, in the words of transformers.

The released file (hub: nomic-ai/nomic-embed-text-v1.5) has GPT-2's names, for code of its own. transformers 5 has this model
(`nomic_bert`) and renames the tensors itself, but takes its own defaults for sizes that it does not find under its own names.
"""

from __future__ import annotations

from typing import Any

from nev.config.base import ConfigError

MODEL_TYPE = "nomic_bert"
_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
    "resid_pdrop": "hidden_dropout_prob",
    "attn_pdrop": "attention_probs_dropout_prob",
}
_WHOLE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
# What transformers' nomic_bert computes. A released config that says something else is of another model.
_FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("swiglu",),
    "prenorm": (False,),
    "qkv_proj_bias": (False,),
    "mlp_fc1_bias": (False,),
    "mlp_fc2_bias": (False,),
    "rotary_emb_fraction": (1, 1.0),
    "rotary_emb_interleaved": (False,),
    "rotary_emb_scale_base": (None,),
    "rotary_scaling_factor": (None,),
    "use_rms_norm": (False, None),
    "parallel_block": (False,),
    "num_experts": (0, None),
}
_KEPT = ("vocab_size", "type_vocab_size", "initializer_range", "pad_token_id")


def is_released_config(raw: dict[str, Any]) -> bool:
    """Whether a config.json is of the released layout, of a text or a vision model."""
    return raw.get("model_type") == MODEL_TYPE and "n_embd" in raw


def translate_config(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """A released config by the names of transformers' `NomicBertConfig`. where: the model, for messages.

    Raises ConfigError for a vision model, and for a value that transformers' `nomic_bert` does not compute.
    """
    if raw.get("patch_size") or raw.get("img_size"):
        raise ConfigError(
            f"text.encoder {where!r} is a vision model (its config.json has a patch_size), not a text encoder"
        )
    other = [f"{name}: {raw[name]}" for name, allowed in _FIXED.items() if name in raw and raw[name] not in allowed]
    if other:
        raise ConfigError(
            f"text.encoder {where!r}: transformers' {MODEL_TYPE} does not compute {', '.join(other)}. Its own code does: give "
            "text.trust_remote_code: true, after reading that code"
        )
    settings = {name: raw[name] for name in _KEPT if raw.get(name) is not None}
    settings |= {ours: raw[theirs] for theirs, ours in _NAMES.items() if raw.get(theirs) is not None}
    settings |= {name: int(settings[name]) for name in _WHOLE if name in settings}
    settings.setdefault("intermediate_size", 4 * settings["hidden_size"])
    if (multiple := raw.get("pad_vocab_size_multiple")) and "vocab_size" in settings:
        settings["vocab_size"] = -(-settings["vocab_size"] // multiple) * multiple
    theta = float(raw.get("rotary_emb_base") or 1000.0)
    return {**settings, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}

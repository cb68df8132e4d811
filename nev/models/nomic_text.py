"""The config of a released nomic-embed-text, in the words of transformers.

The released file (hub: nomic-ai/nomic-embed-text-v1.5) has GPT-2's names, for code of its own. transformers 5 has this model
(`nomic_bert`) and renames the tensors itself, but takes its own defaults for sizes that it does not find under its own names.
Since 2026 the hub's file has both, and the names of transformers count.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nev.common.errors import first_few
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
_SAME = ("vocab_size", "type_vocab_size", "initializer_range", "pad_token_id")  # in both
# What the released code takes for a key that is absent. The hub's files have all of them.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "layer_norm_epsilon": 1e-5,
    "resid_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "activation_function": "gelu_new",
    "qkv_proj_bias": True,
    "mlp_fc1_bias": True,
    "mlp_fc2_bias": True,
    "rotary_emb_fraction": 0.0,
    "rotary_emb_base": 10_000,
}
# What transformers' nomic_bert computes. A released config that says something else is of another model.
_FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("swiglu",),
    "prenorm": (False,),
    "qkv_proj_bias": (False,),
    "mlp_fc1_bias": (False,),
    "mlp_fc2_bias": (False,),
    "norm_mlp": (False, None),
    "rotary_emb_fraction": (1.0,),
    "rotary_emb_interleaved": (False,),
    "rotary_emb_scale_base": (None,),
    "rotary_scaling_factor": (None, 0),
    "rotary_head_dim": (False, None),
    "use_rms_norm": (False, None),
    "parallel_block": (False,),
    "causal": (False,),
    "num_experts": (0, None),
    "num_heads_kv": (None,),
}
MLP_MULTIPLE = 256  # of the MLP's width, in the released code
_TRAINED_LENGTH = 2048  # where n_positions is 0


def is_released_config(raw: dict[str, Any]) -> bool:
    """Whether a config.json is of the released layout, of a text or a vision model."""
    return raw.get("model_type") == MODEL_TYPE and "n_embd" in raw


def translate_config(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """A released config by the names of transformers' `NomicBertConfig`. where: the model, for messages.

    Raises ConfigError for a vision model, and for a value that transformers' `nomic_bert` does not compute.
    """
    if raw.get("patch_size") or raw.get("img_size"):
        raise ConfigError(_not_text(where, "its config.json has a patch_size"))
    native = "hidden_size" in raw
    known = raw if native else {**_DEFAULTS, **raw}
    other = [f"{key}: {known[key]}" for key, allowed in _FIXED.items() if key in known and known[key] not in allowed]
    if other:
        raise ConfigError(
            f"text.encoder {where!r}: transformers' {MODEL_TYPE} does not compute {', '.join(other)}. Its own code does: give "
            "text.trust_remote_code: true, after reading that code"
        )
    if native:
        return {key: raw[key] for key in (*_NAMES.values(), *_SAME, "rope_parameters") if raw.get(key) is not None}
    settings = {ours: known[theirs] for theirs, ours in _NAMES.items() if known.get(theirs) is not None}
    settings |= {key: known[key] for key in _SAME if known.get(key) is not None}
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        settings[key] = int(settings[key])
    hidden = int(settings.get("intermediate_size") or 8 * settings["hidden_size"] / 3)
    settings["intermediate_size"] = _round_up(hidden, MLP_MULTIPLE)
    settings["max_position_embeddings"] = settings["max_position_embeddings"] or _TRAINED_LENGTH
    settings["vocab_size"] = _round_up(settings["vocab_size"], known.get("pad_vocab_size_multiple") or 1)
    theta = float(known["rotary_emb_base"])
    return {**settings, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def refuse_other_tensors(unused: Iterable[str], where: str) -> None:
    """Raise ConfigError where a file holds tensors that transformers' `nomic_bert` leaves out, but for heads of other tasks.

    unused: names of the tensors that were not loaded. where: the model, for messages.
    """
    if any(name.startswith("selector.") for name in unused):
        raise ConfigError(_not_text(where, "its weights have a `selector`"))
    other = [name for name in unused if name.startswith(("embeddings.", "encoder.", "layers."))]
    if other:
        raise ConfigError(
            f"text.encoder {where!r}: its weights have {first_few(other)}, which transformers' {MODEL_TYPE} leaves out, so its "
            "vectors would be others. The config.json and the weights are not of one model"
        )


def _not_text(where: str, evidence: str) -> str:
    return (
        f"text.encoder {where!r} is a vision model ({evidence}), not a text encoder. nev.load opens a released "
        "nomic-embed-vision, and vision.weights trains on from it"
    )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

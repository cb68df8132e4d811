"""Conversion between the layout of the released nomic-embed-vision-v1.5 and nev's vision tower, in both directions.

The released tower (hub: nomic-ai/nomic-embed-vision-v1.5, arXiv 2406.18587) is timm's `eva02_base_patch14_224` with
patch_size=16, ref_feat_shape=(14, 14), no last norm, and the pool `nomic`: configs/nomic_embed_vision_v1_5.yaml. Names
and shapes follow its `modeling_hf_nomic_bert.py` (NomicVisionModel) and contrastors' `models/vit/timm_vit.py`:

    released                        nev                                  difference
    embeddings.proj.weight          trunk.patch_embed.proj.weight        [D, 3 p p] against a convolution's [D, 3, p, p]
    layers.N.attn.Wqkv              trunk.blocks.N.attn.{q,k,v}_proj     stacked [3 D, D]; the key has a bias too
    layers.N.mlp.fc11, fc12         trunk.blocks.N.mlp.fc1_x, fc1_g      value, gate
    selector.*                      pool.*

The released tower differs from timm's in two details that change numbers: a key bias (which does not cancel in the softmax
under rotary embeddings), and eps = 1e-5 of the norm inside the MLP (timm: 1e-6). `match_released` changes a trunk in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isqrt
from typing import Any

import torch
from timm.layers.mlp import SwiGLU
from timm.models.eva import EvaBlock
from torch import Tensor, nn

from nev.common.errors import first_few

RELEASED_MARK = "selector.attn.latent"  # a key that only the released layout has
MLP_NORM_EPS = 1e-5  # nn.LayerNorm's default, which the released MLP uses

_TOWER = {
    "embeddings.cls_token": "trunk.cls_token",
    "embeddings.pos_embed": "trunk.pos_embed",
    "embeddings.proj.bias": "trunk.patch_embed.proj.bias",
    "selector.attn.latent": "pool.latent",
}
_HEAD = {
    "attn.Wq": "q",
    "attn.Wkv": "kv",
    "attn.out_proj": "proj",
    "norm1": "norm",
    "mlp.fc11": "mlp.fc1_x",
    "mlp.fc12": "mlp.fc1_g",
    "mlp.fc2": "mlp.fc2",
}
_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.out_proj": "attn.proj",
    "mlp.fc11": "mlp.fc1_x",
    "mlp.fc12": "mlp.fc1_g",
    "mlp.norm": "mlp.norm",
    "mlp.fc2": "mlp.fc2",
}
_PATCH = ("embeddings.proj.weight", "trunk.patch_embed.proj.weight")
_LEAVES = ("weight", "bias")


def match_released(trunk: Any) -> None:
    """Give the blocks of an EVA-02 trunk, in place, a key bias of zero and the released eps of the MLP norm.

    Only the eps changes the tokens. A trunk of another architecture is not changed.
    """
    for block in getattr(trunk, "blocks", ()):
        if not isinstance(block, EvaBlock) or not isinstance(block.mlp, SwiGLU):
            continue
        attention: Any = block.attn
        query, key = attention.q_proj, attention.k_proj  # None where timm fuses them
        if key is not None and key.bias is None and query.bias is not None:
            key.register_parameter("bias", nn.Parameter(torch.zeros_like(query.bias)))
        if isinstance(block.mlp.norm, nn.LayerNorm):
            block.mlp.norm.eps = MLP_NORM_EPS


def from_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A released state dict under the names and shapes of nev's tower. The inverse of `to_released`, bit for bit.

    Values and dtypes do not change. Stacked weights are copied; the other tensors are shared with `state`.
    Raises ValueError, which names keys that are missing or that the layout does not have.
    """
    rest, out = dict(state), dict[str, Tensor]()
    missing: list[str] = []
    for theirs, ours in _name_pairs(_depth(rest, "layers.")):
        out[ours] = _take(rest, theirs, missing)
    patches = _take(rest, _PATCH[0], missing)
    side = isqrt(patches.shape[-1] // 3) if patches.ndim == 2 else 0
    out[_PATCH[1]] = patches.reshape(len(patches), 3, side, side) if side else patches
    for layer in range(_depth(state, "layers.")):
        for leaf in _LEAVES:
            stacked = _take(rest, f"layers.{layer}.attn.Wqkv.{leaf}", missing)
            for part, tensor in zip("qkv", stacked.chunk(3), strict=False):
                out[f"trunk.blocks.{layer}.attn.{part}_proj.{leaf}"] = tensor.clone()
    _refuse("the released layout of nomic-embed-vision", missing, rest)
    return out


def to_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of nev's tower under the released names and shapes. The inverse of `from_released`, bit for bit.

    Raises ValueError, which names missing and unknown keys, if `state` is not of a tower in the released architecture (pool
    `nomic` on an EVA-02 trunk without last norm, no head).
    """
    rest, out = dict(state), dict[str, Tensor]()
    missing: list[str] = []
    depth = _depth(rest, "trunk.blocks.")
    for theirs, ours in _name_pairs(depth):
        out[theirs] = _take(rest, ours, missing)
    out[_PATCH[0]] = _take(rest, _PATCH[1], missing).flatten(1)
    for layer in range(depth):
        for leaf in _LEAVES:
            parts = [_take(rest, f"trunk.blocks.{layer}.attn.{part}_proj.{leaf}", missing) for part in "qkv"]
            out[f"layers.{layer}.attn.Wqkv.{leaf}"] = parts[0] if missing else torch.cat(parts)  # refused below
    _refuse("a tower in nomic-embed-vision's architecture", missing, rest)
    return out


def _name_pairs(depth: int) -> list[tuple[str, str]]:
    """(released, nev) names of every tensor that both layouts hold in the same shape."""
    modules = [(f"selector.{a}", f"pool.{b}") for a, b in _HEAD.items()]
    modules += [(f"layers.{n}.{a}", f"trunk.blocks.{n}.{b}") for n in range(depth) for a, b in _BLOCK.items()]
    return [*_TOWER.items(), *((f"{a}.{leaf}", f"{b}.{leaf}") for a, b in modules for leaf in _LEAVES)]


def _depth(names: Iterable[str], prefix: str) -> int:
    """Layers that a file has. A number beyond is a name that the layout does not have."""
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})


def _take(rest: dict[str, Tensor], name: str, missing: list[str]) -> Tensor:
    if name not in rest:
        missing.append(name)
    return rest.pop(name, torch.zeros(3, 1))


def _refuse(what: str, missing: list[str], unknown: Mapping[str, Tensor]) -> None:
    if missing or unknown:
        raise ValueError(
            f"this is not {what}\n  missing: {first_few(missing) or 'none'}\n  unknown: {first_few(list(unknown)) or 'none'}"
        )

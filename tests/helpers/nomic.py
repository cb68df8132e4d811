"""The released nomic-embed-vision in small: its files as they lie on the hub, and its arithmetic written out again.

`released_forward` is plain torch after the released `modeling_hf_nomic_bert.py`; it shares no code with timm or nev.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

CODE = "nomic-ai/nomic-bert-2048--"


class VisionSizes(NamedTuple):
    """Sizes of a vision model: width, width of the MLP, blocks, side of a patch, patches a side, attention heads."""

    dim: int = 48
    hidden: int = 256
    depth: int = 2
    patch: int = 8
    grid: int = 4
    heads: int = 4


def released_shapes(sizes: VisionSizes) -> dict[str, tuple[int, ...]]:
    """Every tensor of the released vision model."""
    dim, hidden, depth, patch, grid, _ = sizes
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, dim),
        "embeddings.pos_embed": (1, grid * grid + 1, dim),
        "selector.attn.latent": (1, 1, dim),
    }

    def linear(name: str, rows: int, columns: int) -> None:
        shapes.update({f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)})

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    def mlp(name: str) -> None:
        linear(f"{name}.fc11", hidden, dim)
        linear(f"{name}.fc12", hidden, dim)
        linear(f"{name}.fc2", dim, hidden)

    linear("embeddings.proj", dim, 3 * patch * patch)
    for layer in (f"layers.{n}" for n in range(depth)):
        linear(f"{layer}.attn.Wqkv", 3 * dim, dim)
        linear(f"{layer}.attn.out_proj", dim, dim)
        norm(f"{layer}.norm1", dim)
        norm(f"{layer}.norm2", dim)
        norm(f"{layer}.mlp.norm", hidden)
        mlp(f"{layer}.mlp")
    linear("selector.attn.Wq", dim, dim)
    linear("selector.attn.Wkv", 2 * dim, dim)
    linear("selector.attn.out_proj", dim, dim)
    norm("selector.norm1", dim)
    mlp("selector.mlp")
    return shapes


def random_released(sizes: VisionSizes, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A released state dict of the vision model with no tensor at its default, the key bias included."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=draw, dtype=torch.float64) * (0.5 if len(shape) == 1 else 0.15)).to(dtype)
        for name, shape in released_shapes(sizes).items()
    }


def released_forward(w: dict[str, Tensor], images: Tensor, sizes: VisionSizes, ref: int | None = None) -> Tensor:
    """[b, 3, H, W] -> the model's `last_hidden_state[:, 0]`, [b, dim]. ref: `ref_feat_shape`; None for as many as patches."""
    dim, _, depth, patch, grid, heads = sizes
    ref = ref or grid

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor, name: str, eps: float = 1e-6) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
        )

    def split(x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], heads, dim // heads).movedim(-2, 1)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2) / math.sqrt(dim // heads)).softmax(-1)
        return (scores @ v).movedim(1, -2).flatten(-2)

    bands = 10_000.0 ** -(torch.arange(dim // heads // 4, dtype=images.dtype) / (dim // heads // 4))
    place = torch.arange(grid, dtype=images.dtype) / grid * ref
    rows = place.repeat_interleave(grid)[:, None] * bands
    columns = place.repeat(grid)[:, None] * bands
    angle = torch.cat([rows, columns], -1).repeat_interleave(2, -1)

    def rotary(x: Tensor) -> Tensor:  # pairs of neighbours; the class token stays
        even, odd = x[..., 1:, 0::2], x[..., 1:, 1::2]
        turned = torch.stack([-odd, even], -1).flatten(-2)
        return torch.cat([x[..., :1, :], x[..., 1:, :] * angle.cos() + turned * angle.sin()], -2)

    def gated(x: Tensor, name: str, inner: bool) -> Tensor:
        y = linear(x, f"{name}.fc11") * F.silu(linear(x, f"{name}.fc12"))
        return linear(norm(y, f"{name}.norm", eps=1e-5) if inner else y, f"{name}.fc2")

    pieces = images.unfold(2, patch, patch).unfold(3, patch, patch)  # b c h w p1 p2
    pieces = pieces.permute(0, 2, 3, 1, 4, 5).reshape(len(images), grid * grid, -1)
    x = torch.cat([w["embeddings.cls_token"].expand(len(images), -1, -1), linear(pieces, "embeddings.proj")], 1)
    x = x + w["embeddings.pos_embed"]
    for n in range(depth):
        q, k, v = (split(part) for part in linear(norm(x, f"layers.{n}.norm1"), f"layers.{n}.attn.Wqkv").chunk(3, -1))
        x = x + linear(attention(rotary(q), rotary(k), v), f"layers.{n}.attn.out_proj")
        x = x + gated(norm(x, f"layers.{n}.norm2"), f"layers.{n}.mlp", inner=True)
    query = split(linear(w["selector.attn.latent"].expand(len(images), -1, -1), "selector.attn.Wq"))
    key, value = (split(part) for part in linear(x, "selector.attn.Wkv").chunk(2, -1))
    pooled = linear(attention(query, key, value), "selector.attn.out_proj")
    hidden = x + gated(norm(pooled, "selector.norm1"), "selector.mlp", inner=False)
    return hidden[:, 0]


def released_vision_config(sizes: VisionSizes) -> dict[str, Any]:
    """config.json as contrastors writes it: GPT-2's names, and a pointer to code."""
    return {
        "model_type": "nomic_bert",
        "architectures": ["NomicVisionModel"],
        "auto_map": {
            "AutoModel": f"{CODE}modeling_hf_nomic_bert.NomicVisionModel"
        },  # no such file: running it would fail
        "activation_function": "swiglu",
        "causal": False,
        "global_pool": None,
        "img_size": sizes.grid * sizes.patch,
        "layer_norm_epsilon": 1e-6,
        "mlp_fc1_bias": True,
        "mlp_fc2_bias": True,
        "n_embd": sizes.dim,
        "n_head": sizes.heads,
        "n_inner": float(sizes.hidden),  # as it lies there: mlp_ratio * n_embd
        "n_layer": sizes.depth,
        "n_positions": 0,
        "norm_mlp": True,
        "num_channels": 3,
        "parallel_block": False,
        "patch_size": sizes.patch,
        "prenorm": True,
        "qkv_proj_bias": True,
        "ref_feat_shape": [sizes.grid, sizes.grid],
        "rotary_emb_base": 10000,
        "rotary_emb_fraction": 0,
        "use_pos_embed": True,
        "use_rms_norm": False,
        "use_rotary_pos_emb": True,
        "vocab_size": 0,
    }


def write_released_vision(folder: Path, sizes: VisionSizes, seed: int = 0, **config: Any) -> dict[str, Tensor]:
    """The folder of a released vision model with random tensors, which are returned. config: in the place of config.json's."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_released(sizes, seed)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**released_vision_config(sizes), **config}))
    pixels = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3], "do_center_crop": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return tensors

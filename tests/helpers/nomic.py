"""The released nomic-embed models in small: their files as they lie on the hub, and their arithmetic written out again.

`released_forward` and `text_by_hand` are plain torch after the released `modeling_hf_nomic_bert.py`; they share no code with
timm, transformers or nev.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "search", "_", "query", ":", "a", "red", "dog", "on", "snow", "cat", "."]
CODE = "nomic-ai/nomic-bert-2048--"


class VisionSizes(NamedTuple):
    """Sizes of a vision model: width, width of the MLP, blocks, side of a patch, patches a side, attention heads."""

    dim: int = 48
    hidden: int = 256
    depth: int = 2
    patch: int = 8
    grid: int = 4
    heads: int = 4


class TextSizes(NamedTuple):
    """Sizes of a text model: width, attention heads, layers, width of the MLP, tokens, base of the rotary embedding."""

    dim: int = 24
    heads: int = 2
    layers: int = 2
    hidden: int = 256
    vocabulary: int = len(WORDS)
    base: float = 1000.0


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


def write_tokenizer(folder: Path) -> None:
    """A fast tokenizer of WORDS."""
    tokenizer = Tokenizer(WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def released_text_config(sizes: TextSizes) -> dict[str, Any]:
    """config.json of a released text model before 2026: GPT-2's names, and a pointer to code."""
    return {
        "model_type": "nomic_bert",
        "architectures": ["NomicBertModel"],
        "auto_map": {"AutoModel": "modeling_hf_nomic_bert.NomicBertModel"},  # no such file: running it would fail
        "activation_function": "swiglu",
        "attn_pdrop": 0.0,
        "causal": False,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-12,
        "max_trained_positions": 2048,
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
        "n_embd": sizes.dim,
        "n_head": sizes.heads,
        "n_inner": float(sizes.hidden),
        "n_layer": sizes.layers,
        "n_positions": 8192,
        "pad_vocab_size_multiple": 64,
        "parallel_block": False,
        "prenorm": False,
        "qkv_proj_bias": False,
        "resid_pdrop": 0.0,
        "rotary_emb_base": sizes.base,
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "rotary_emb_scale_base": None,
        "rotary_scaling_factor": None,
        "type_vocab_size": 2,
        "use_rms_norm": False,
        "vocab_size": sizes.vocabulary,
    }


def native_text_config(sizes: TextSizes) -> dict[str, Any]:
    """config.json of the same model by the names of transformers."""
    return {
        "model_type": "nomic_bert",
        "architectures": ["NomicBertModel"],
        "auto_map": {"AutoModel": "modeling_hf_nomic_bert.NomicBertModel"},
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.dim,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "intermediate_size": sizes.hidden,
        "max_position_embeddings": 128,
    }


def write_released_text(
    folder: Path, sizes: TextSizes, config: dict[str, Any], rows: int | None = None
) -> dict[str, Tensor]:
    """The folder of a released text model with random tensors, which are returned.

    config: of config.json. rows: of the table of words; None for as many as words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config))
    dim, _, layers, hidden, words, _ = sizes
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (rows or words, dim),
        "embeddings.token_type_embeddings.weight": (2, dim),
        "emb_ln.weight": (dim,),
        "emb_ln.bias": (dim,),
    }
    for layer in (f"encoder.layers.{n}" for n in range(layers)):
        shapes |= {f"{layer}.attn.Wqkv.weight": (3 * dim, dim), f"{layer}.attn.out_proj.weight": (dim, dim)}
        shapes |= {f"{layer}.mlp.{part}.weight": (hidden, dim) for part in ("fc11", "fc12")}
        shapes |= {f"{layer}.mlp.fc2.weight": (dim, hidden)}
        shapes |= {f"{layer}.{norm}.{leaf}": (dim,) for norm in ("norm1", "norm2") for leaf in ("weight", "bias")}
    draw = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=draw) * 0.4 for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


def text_by_hand(weights: dict[str, Tensor], sentence: str, sizes: TextSizes, eps: float = 1e-12) -> Tensor:
    """Words between spaces, special tokens included -> mean of the released `NomicBertModel`'s last states, float64 [dim]."""
    dim, heads, layers, _, _, base = sizes
    w = {name: tensor.double() for name, tensor in weights.items()}
    ids = torch.tensor([WORDS.index(word) for word in sentence.split()])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (dim,), w[f"{name}.weight"], w[f"{name}.bias"], eps)

    inverse = base ** -(torch.arange(0, dim // heads, 2, dtype=torch.float64) / (dim // heads))
    angle = (torch.arange(len(ids), dtype=torch.float64)[:, None] * inverse).repeat(1, 2)

    def rotary(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-high, low], -1) * angle.sin()

    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.token_type_embeddings.weight"][0]
    x = norm(x, "emb_ln")
    for layer in (f"encoder.layers.{n}" for n in range(layers)):
        qkv = (x @ w[f"{layer}.attn.Wqkv.weight"].T).chunk(3, -1)
        q, k, v = (part.view(len(ids), heads, -1).transpose(0, 1) for part in qkv)
        scores = rotary(q) @ rotary(k).transpose(1, 2) / math.sqrt(dim // heads)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(ids), dim)
        x = norm(x + mixed @ w[f"{layer}.attn.out_proj.weight"].T, f"{layer}.norm1")
        gated = (x @ w[f"{layer}.mlp.fc11.weight"].T) * F.silu(x @ w[f"{layer}.mlp.fc12.weight"].T)
        x = norm(x + gated @ w[f"{layer}.mlp.fc2.weight"].T, f"{layer}.norm2")
    return x.mean(0)


def layer_norm_unit(mean: Tensor) -> Tensor:
    """LayerNorm without weights, then unit length: what v1.5 does to the mean. [dim] -> [dim]."""
    centred = mean - mean.mean()
    return F.normalize(centred / (centred.square().mean() + 1e-5).sqrt(), dim=0)

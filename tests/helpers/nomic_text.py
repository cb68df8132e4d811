"""The released nomic-embed-text in small: its files as they lie on the hub, and its arithmetic written out again.

`text_by_hand` is plain torch after the released `modeling_hf_nomic_bert.py`; it shares no code with transformers or nev.
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


class TextSizes(NamedTuple):
    """Sizes of a text model: width, attention heads, layers, width of the MLP, tokens, base of the rotary embedding."""

    dim: int = 24
    heads: int = 2
    layers: int = 2
    hidden: int = 256
    vocabulary: int = len(WORDS)
    base: float = 1000.0


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

"""A released nomic-embed-text: its config in GPT-2's names, in small and in other sizes, against its arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.nomic import VisionSizes, random_released, write_released_vision
from helpers.nomic_text import (
    WORDS,
    TextSizes,
    layer_norm_unit,
    native_text_config,
    released_text_config,
    text_by_hand,
    write_released_text,
)
from safetensors.torch import load_file, save_file

from nev.config.base import ConfigError
from nev.config.model import Text
from nev.models.nomic_text import translate_config
from nev.models.text import load_text, text_width

PADDED = 64  # the vocabulary, rounded up to `pad_vocab_size_multiple`
SENTENCES = {"a red dog on snow.": "a red dog on snow .", "cat": "cat", "": ""}


def check(folder: Path, weights: dict[str, torch.Tensor], sizes: TextSizes, eps: float = 1e-12) -> None:
    """The tower of a folder computes the released arithmetic, with the recipe of v1.5."""
    config = Text(encoder=str(folder), prefix="search_query: ", layer_norm=True)
    tower = load_text(config)
    assert tower.width == text_width(config) == sizes.dim
    for row, words in zip(tower.encode(list(SENTENCES)), SENTENCES.values(), strict=True):
        mean = text_by_hand(weights, f"[CLS] search _ query : {words} [SEP]", sizes, eps)
        np.testing.assert_allclose(row, layer_norm_unit(mean), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "sizes",
    [TextSizes(), TextSizes(dim=32, heads=4, layers=3, hidden=512), TextSizes(base=20.0)],
    ids=["small", "other sizes", "another rotary base"],
)
def test_the_released_config_and_tensors(sizes: TextSizes, tmp_path: Path) -> None:
    weights = write_released_text(tmp_path, sizes, released_text_config(sizes), rows=PADDED)
    check(tmp_path, weights, sizes)


@pytest.mark.parametrize(
    ("dim", "inner", "hidden"),
    [(24, None, 256), (120, None, 512), (24, 250, 256), (24, 257.0, 512), (24, 256.0, 256)],
)
def test_the_width_of_the_mlp_is_the_released_codes(dim: int, inner: float | None, hidden: int, tmp_path: Path) -> None:
    """It rounds up to a multiple of 256, and takes 8/3 of the width where none is given."""
    sizes = TextSizes(dim=dim, hidden=hidden)
    weights = write_released_text(tmp_path, sizes, {**released_text_config(sizes), "n_inner": inner}, rows=PADDED)
    check(tmp_path, weights, sizes)


def test_a_key_that_is_absent_has_the_released_default(tmp_path: Path) -> None:
    sizes = TextSizes(base=10_000.0)
    config = released_text_config(sizes)
    for name in ("rotary_emb_base", "layer_norm_epsilon", "pad_vocab_size_multiple"):
        del config[name]
    check(tmp_path, write_released_text(tmp_path, sizes, config), sizes, eps=1e-5)
    del config["qkv_proj_bias"]
    with pytest.raises(ConfigError, match="does not compute qkv_proj_bias: True"):
        translate_config(config, "here")


def test_a_config_with_both_kinds_of_names(tmp_path: Path) -> None:
    """The hub's file since 2026. transformers' own names count."""
    sizes = TextSizes(hidden=40, base=30.0)
    both = {**released_text_config(sizes), **native_text_config(sizes), "n_inner": 999, "rotary_emb_base": 999}
    both["rope_parameters"] = {"rope_type": "default", "rope_theta": 30.0}
    check(tmp_path, write_released_text(tmp_path, sizes, both), sizes)
    assert (
        load_text(Text(encoder=str(tmp_path), max_tokens=8)).longest == 128
    )  # max_position_embeddings, not n_positions


def test_positions_of_the_released_config() -> None:
    config = released_text_config(TextSizes())
    assert translate_config(config, "here")["max_position_embeddings"] == 8192
    assert translate_config({**config, "n_positions": 0}, "here")["max_position_embeddings"] == 2048


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prenorm", True),
        ("rotary_emb_fraction", 0.5),
        ("rotary_emb_fraction", 0.0),
        ("rotary_emb_interleaved", True),
        ("rotary_emb_scale_base", 512),
        ("rotary_scaling_factor", 2),
        ("qkv_proj_bias", True),
        ("mlp_fc1_bias", True),
        ("mlp_fc2_bias", True),
        ("norm_mlp", True),
        ("use_rms_norm", True),
        ("num_experts", 8),
        ("activation_function", "gelu"),
        ("parallel_block", True),
        ("causal", True),
    ],
)
def test_another_architecture_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    sizes = TextSizes()
    for config in (released_text_config(sizes), {**released_text_config(sizes), **native_text_config(sizes)}):
        write_released_text(tmp_path, sizes, {**config, name: value})
        for read in (load_text, text_width):
            with pytest.raises(ConfigError, match=f"does not compute {name}: {value}") as caught:
                read(Text(encoder=str(tmp_path)))
            assert str(tmp_path) in str(caught.value)
            assert "trust_remote_code: true, after reading that code" in str(caught.value)


def test_tensors_that_would_be_left_out_are_refused(tmp_path: Path) -> None:
    sizes = TextSizes()
    weights = write_released_text(tmp_path, sizes, released_text_config(sizes), rows=PADDED)
    save_file({**weights, "cls.predictions.decoder.bias": torch.zeros(64)}, tmp_path / "model.safetensors")
    check(tmp_path, weights, sizes)  # the head of another task
    odd = {**weights, "encoder.layers.0.attn.Wqkv.bias": torch.ones(3 * sizes.dim)}
    save_file(odd, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"its weights have layers\.0\.self_attn\..*vectors would be others"):
        load_text(Text(encoder=str(tmp_path)))


def test_a_table_of_words_of_another_size_is_refused(tmp_path: Path) -> None:
    sizes = TextSizes()
    write_released_text(tmp_path, sizes, released_text_config(sizes), rows=len(WORDS))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_text(Text(encoder=str(tmp_path)))


def test_a_vision_model_is_no_text_encoder(tmp_path: Path) -> None:
    write_released_vision(tmp_path, VisionSizes())
    config = Text(encoder=str(tmp_path))
    for read in (load_text, text_width):
        with pytest.raises(ConfigError, match=r"is a vision model .*patch_size"):
            read(config)


def test_a_vision_model_is_known_by_its_tensors(tmp_path: Path) -> None:
    sizes = TextSizes()
    write_released_text(tmp_path, sizes, released_text_config(sizes), rows=PADDED)
    save_file(random_released(VisionSizes(dim=sizes.dim)), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "patch_size" not in json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"is a vision model .*selector"):
        load_text(Text(encoder=str(tmp_path)))
    mixed = {
        **load_file(tmp_path / "model.safetensors"),
        **write_released_text(tmp_path, sizes, released_text_config(sizes), PADDED),
    }
    save_file(mixed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"is a vision model .*selector"):
        load_text(Text(encoder=str(tmp_path)))

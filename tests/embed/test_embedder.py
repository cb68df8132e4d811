"""A checkpoint opened once: its vectors are those of the two towers, its fingerprints change with what decides a vector."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.training import CPU, prepare_job, run_bare, train_reader

from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.embed.embedder import Embedder
from nev.inference.forward import make_embedder
from nev.models.lock import CANARIES
from nev.models.text import TextTower
from nev.models.vision import normalise
from nev.runs.manifest import CheckpointError, latest_checkpoint
from nev.runs.towers import load_logit_scale, load_text_tower, load_vision

Make = Callable[..., Experiment]


def checkpoint(config: Experiment, text: TextTower) -> str:
    """The location of a checkpoint after the steps of `config`."""
    job = prepare_job(config, text)
    run_bare(job, train_reader(config, text))
    return str(latest_checkpoint(job.run))


@pytest.fixture
def make(tiny: Make) -> Make:
    return lambda **settings: tiny(train__steps=1, data__val=None, eval={}, **settings)


def test_vectors_are_those_of_the_towers(make: Make, text: TextTower) -> None:
    location = checkpoint(make(), text)
    embedder = Embedder.from_checkpoint(location)
    data = embedder.config.data
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    with torch.inference_mode():
        vision = load_vision(location, embedder.config, text.width).eval()
        expected = vision(normalise(torch.from_numpy(images), data.mean, data.std)).numpy()
    vectors = embedder.make_image_embedder(CPU)(images)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, expected)
    spec = embedder.encoder_spec()
    assert (spec.mean, spec.std) == (data.mean, data.std)
    assert all(torch.equal(a, b) for a, b in zip(spec.load().parameters(), vision.parameters(), strict=True))
    np.testing.assert_array_equal(embedder.encode_text(CANARIES), text.encode(CANARIES))
    assert embedder.logit_scale == load_logit_scale(location)
    assert embedder.step == 1
    assert embedder.text is embedder.base_text


@pytest.mark.slow
def test_a_text_tower_that_was_trained_is_the_checkpoints(make: Make, text: TextTower) -> None:
    location = checkpoint(make(lock="none", train__micro_batch=32, optim__warmup_steps=0), text)
    embedder = Embedder.from_checkpoint(location)
    assert embedder.base_text.fingerprint == text.fingerprint
    vectors = embedder.encode_text(CANARIES)
    np.testing.assert_array_equal(vectors, load_text_tower(location, embedder.config).encode(CANARIES))
    assert np.abs(vectors - text.encode(CANARIES)).max() > 1e-4
    assert embedder.text_fingerprint not in (text.fingerprint, embedder.fingerprint)


@pytest.mark.slow
def test_fingerprints_change_with_what_decides_a_vector(make: Make, text: TextTower) -> None:
    first = Embedder.from_checkpoint(checkpoint(make(name="first"), text))
    other = Embedder.from_checkpoint(checkpoint(make(name="other", optim__lr=2e-3, optim__warmup_steps=1), text))
    same = Embedder.from_checkpoint(first.location)
    darker = Embedder.from_checkpoint(first.location, ["data.mean=[0.5,0.5,0.5]"])
    assert first.fingerprint == same.fingerprint
    assert len({first.fingerprint, other.fingerprint, darker.fingerprint}) == 3
    assert {one.text_fingerprint for one in (first, other, same, darker)} == {text.fingerprint}


@pytest.mark.slow
def test_what_cannot_be_opened_is_named(make: Make, text: TextTower, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        Embedder.from_checkpoint(str(tmp_path))
    location = checkpoint(make(), text)
    with pytest.raises(CheckpointError, match="was trained against another text tower"):
        Embedder.from_checkpoint(location, ["text.prefix=query"])
    with pytest.raises(ConfigError, match="lock"):
        Embedder.from_checkpoint(location, ["lock=none"])


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, nev.embed.embedder; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("rows", "forwards"), [(None, [16, 16, 8]), (64, [40])])
def test_few_pictures_pass_a_cpu_at_a_time_but_for_fsdp(rows: int | None, forwards: list[int]) -> None:
    """Under FSDP a block is one forward on every rank, whatever its size: a forward is a collective."""
    seen = []

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return pixels.mean((2, 3))

    images = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), dtype=np.uint8)
    vectors = make_embedder(forward, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), CPU, rows)(images)
    assert seen == forwards
    np.testing.assert_allclose(vectors, images.mean((1, 2)) / 255, rtol=1e-5)

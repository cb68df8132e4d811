"""A checkpoint opened for embedding: pictures and sentences to vectors of one space."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from nev.common.location import absolute_location
from nev.config.experiment import Experiment
from nev.embed.images import EncoderSpec
from nev.inference.forward import Embed, make_embedder
from nev.runs.manifest import read_manifest

if TYPE_CHECKING:
    import torch

    from nev.models.text import TextTower


@dataclass(frozen=True)
class Embedder:
    """The two towers of a checkpoint. No import of this module loads torch.

    `from_checkpoint` loads the text tower. The other weights are read when they are first needed.

    location: folder or `s3://` prefix of the checkpoint.
    manifest: `state.json` of the checkpoint.
    config: the experiment of the checkpoint, with overrides.
    base_text: the text tower before training, on the CPU.
    """

    location: str
    manifest: dict[str, Any]
    config: Experiment
    base_text: TextTower

    @classmethod
    def from_checkpoint(cls, location: str, overrides: Sequence[str] = ()) -> Self:
        """Open a checkpoint, here or on S3. overrides: `section.key=value`, over the checkpoint's own config.

        Raises CheckpointError for a location that is no checkpoint, and for another text tower than the checkpoint was trained
        against. Raises ConfigError for overrides that do not fit.
        """
        from nev.runs.towers import load_base_text, read_experiment

        location = absolute_location(location)  # Ray's processes have other working folders
        manifest = read_manifest(location)
        config = read_experiment(location, manifest, overrides)
        return cls(location, manifest, config, load_base_text(location, manifest, config))

    @property
    def step(self) -> int:
        """Updates that the checkpoint has seen."""
        return int(self.manifest["step"])

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of what decides the vector of a decoded picture: weights, vision config, mean and deviation of pixels."""
        config = self.config
        vision = config.vision.model_dump(mode="json", exclude={"weights"})
        parts = [self._weights, self.manifest["fingerprints"].get("trunk"), vision, config.data.mean, config.data.std]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def text_fingerprint(self) -> str:
        """sha256 (hex) of what decides the vector of a sentence: of the text tower, or of the trained weights."""
        return self.base_text.fingerprint if self.config.lock == "text" else self._weights

    @property
    def _weights(self) -> str:
        return str(self.manifest["sha256"]["model.safetensors"])

    @cached_property
    def text(self) -> TextTower:
        """The text tower of the checkpoint, on the CPU: `base_text` where that was locked, else the trained tower."""
        if self.config.lock == "text":
            return self.base_text
        from nev.runs.towers import load_text_tower

        return load_text_tower(self.location, self.config)

    def encode_text(self, sentences: Sequence[str]) -> NDArray[np.float32]:
        """Embed sentences in their order: float32 [n, D], rows of unit length. Raises TypeError for a sentence that is no str."""
        return self.text.encode(sentences)

    def encoder_spec(self, features: tuple[int, ...] | None = None) -> EncoderSpec:
        """The vision tower as Ray's tasks load it.

        features: shape of a picture's features, for the layers behind a locked trunk alone. None: the whole tower.
        """
        from nev.runs.towers import load_feature_head, load_vision

        width = self.base_text.width
        load = (
            partial(load_feature_head, self.location, self.config, width, features)
            if features
            else partial(load_vision, self.location, self.config, width)
        )
        return EncoderSpec(load, self.config.data.mean, self.config.data.std)

    def make_image_embedder(self, device: torch.device) -> Embed:
        """Load the vision tower onto a device, in eval mode: uint8 [n, S, S, 3] to float32 [n, D], rows of unit length.

        S is `config.data.image_size`. `nev.data.augment.eval_view` makes such a picture of a decoded one.
        """
        spec = self.encoder_spec()
        return make_embedder(spec.load().to(device).eval(), spec.mean, spec.std, device)

    @cached_property
    def logit_scale(self) -> float:
        """1 / temperature, as the checkpoint has learnt it."""
        from nev.runs.towers import load_logit_scale

        return load_logit_scale(self.location)

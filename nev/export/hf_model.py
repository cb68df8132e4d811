"""The vision tower as a model of transformers. `import nev` registers it, and an export has these classes in a file."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from nev.models.image_encoder import assemble_image_encoder


class NevVisionConfig(PreTrainedConfig):
    """Config of a vision tower.

    vision: the section `vision` of nev.json.
    image_size: side of a picture, in pixels.
    hidden_size: width of an embedding.
    """

    model_type = "nev_vision"

    def __init__(
        self, vision: dict[str, Any] | None = None, image_size: int = 224, hidden_size: int = 768, **more: Any
    ) -> None:
        self.vision, self.image_size, self.hidden_size = vision or {}, image_size, hidden_size
        super().__init__(**more)


class NevVisionModel(PreTrainedModel):
    """Pixels to unit vectors in the space of a text encoder."""

    config_class = NevVisionConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = "image"

    def __init__(self, config: NevVisionConfig) -> None:
        super().__init__(config)
        self.encoder = assemble_image_encoder(SimpleNamespace(**config.vision), config.image_size, config.hidden_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        """Fill what the file does not hold: transformers builds on the meta device, where rotary tables stay empty."""
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """float [b, 3, S, S], normalised -> pooler_output, [b, D] of unit length."""
        return BaseModelOutputWithPooling(pooler_output=self.encoder(pixel_values.to(self.dtype)))


def register() -> None:
    """Make AutoConfig and AutoModel know the classes of this file. `import nev` calls this."""
    from transformers import AutoConfig, AutoModel

    AutoConfig.register(NevVisionConfig.model_type, NevVisionConfig, exist_ok=True)
    AutoModel.register(NevVisionConfig, NevVisionModel, exist_ok=True)

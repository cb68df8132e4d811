"""A server's engine on torch: what `nev.load` opens."""

from __future__ import annotations

from typing import Any

import torch

from nev.config.model_spec import ModelError
from nev.inference.forward import make_embedder
from nev.inference.load import load
from nev.inference.model import Model
from nev.inference.tokenizer import make_tokenizer
from nev.models.text_encoder import pool_tokens
from nev.ops.vectors import Floats
from nev.serve.engine import Engine
from nev.serve.texts import Ints, make_text_encoder

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Pixels of a forward in float32 on a CPU, whose activations stay in the cache. ViT-S/16 at 224 px on one core of an Intel server,
# CPU a picture: 93 ms one at a time, 81 ms at 4, 80 ms at 8, 88 ms at 16; in bfloat16 66, 42, 36 and 32 ms.
FORWARD_PIXELS = 8 * 224**2
BF16_FLAGS = ("amx_bf16", "avx512_bf16")  # of processors that multiply bfloat16 faster than float32


def open_torch(
    location: str,
    precision: str,
    device: str | None,
    threads: int,
    text: str | None,
    revision: str | None,
    trust_remote_code: bool,
) -> Engine:
    """Open what `nev.load` opens. Arguments and errors as `open_engine`."""
    model = load(location, device=device, text=text, revision=revision, trust_remote_code=trust_remote_code)
    _check_precision(precision, model.device)
    if model.device.type == "cpu":
        torch.set_num_threads(threads)
    return make_engine(model, precision)


def make_engine(model: Model, precision: str = "fp32") -> Engine:
    """Wrap an open model. precision: of pictures, one of `fp32`, `bf16` and `fp16`."""
    spec, tower, place = model.spec, model.text, model.device
    vision: Any = model.vision
    rows = max(1, FORWARD_PIXELS // spec.image_size**2) if place.type == "cpu" and precision == "fp32" else None

    def forward_pictures(pixels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(place.type, TYPES.get(precision), enabled=precision in TYPES):
            vectors: torch.Tensor = vision(pixels)
        return vectors

    @torch.inference_mode()
    def forward_texts(ids: Ints, mask: Ints) -> Floats:
        tokens, attention = torch.from_numpy(ids).to(place), torch.from_numpy(mask).to(place)
        hidden = tower.model(input_ids=tokens, attention_mask=attention).last_hidden_state
        vectors: Floats = pool_tokens(hidden, attention, tower.pooling, tower.layer_norm).cpu().numpy()
        return vectors

    return Engine(
        name=spec.name,
        runtime=f"torch on {place}",
        precision=precision,
        width=model.width,
        image_size=spec.image_size,
        limits=spec.limits,
        fingerprint=model.fingerprint,
        text_fingerprint=model.text_fingerprint,
        encode_images=make_embedder(forward_pictures, spec.mean, spec.std, place, rows),
        encode_texts=make_text_encoder(make_tokenizer(tower), spec.prompts, forward_texts),
    )


def _check_precision(precision: str, device: torch.device) -> None:
    if precision == "int8":
        raise ModelError("--precision int8 is for a folder of `nev export --format onnx`")
    if device.type != "cpu":
        return
    if precision == "fp16":
        raise ModelError("--precision fp16 is for GPUs, and for a folder of `nev export --format onnx`")
    if precision == "bf16" and not any(torch.cpu.get_capabilities().get(flag) for flag in BF16_FLAGS):
        raise ModelError(
            "--precision bf16: this processor has no instructions for bfloat16 (AMX, AVX-512 BF16), and fp32 would be faster"
        )

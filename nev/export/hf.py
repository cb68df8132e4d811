"""The format `hf`: the vision tower as a model of transformers, the text tower beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nev.common.version import __version__
from nev.export.card import write_card
from nev.export.hf_model import NevVisionConfig, NevVisionModel
from nev.export.parts import (
    FP32,
    SENTENCES,
    TEXT_FOLDER,
    Check,
    Options,
    compare,
    describe_vision,
    embed_squares,
    make_image_processor,
    normalise_squares,
    picture_limit,
    sample_pictures,
    write_spec,
    write_text_tower,
)
from nev.export.single_file import make_modeling_file
from nev.inference.load import load
from nev.inference.model import Model

WEIGHTS = "model.safetensors"
AUTO_MAP = {"AutoConfig": "modeling_nev.NevVisionConfig", "AutoModel": "modeling_nev.NevVisionModel"}


def write(model: Model, folder: Path, options: Options) -> list[Check]:
    """Write the folder, and compare what transformers computes from it."""
    if options.text:
        write_text_tower(model, folder / TEXT_FOLDER)
    write_vision(model, folder)
    write_spec(model, folder, {WEIGHTS: {"encoder.": ""}}, TEXT_FOLDER if options.text else None)
    write_card(model, folder, "hf", options)
    squares = sample_pictures(model.spec.image_size)
    with torch.inference_mode():
        loaded: Any = NevVisionModel.from_pretrained(folder)
        vectors = loaded.eval()(torch.from_numpy(normalise_squares(model, squares))).pooler_output
    limit = picture_limit(model)
    checks = [compare("transformers", "pictures", vectors.numpy(), embed_squares(model, squares), limit)]
    if options.text:
        theirs, ours = load(folder, device="cpu").encode_text(SENTENCES), model.encode_text(SENTENCES)
        checks.append(compare("nev.load", "texts", theirs, ours, FP32))
    return checks


def write_vision(model: Model, folder: Path) -> None:
    """Write the vision tower: config, weights, image processor, and the code for those without nev."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = model.spec
    vision = describe_vision(model).model_dump(mode="json")
    config = NevVisionConfig(vision, spec.image_size, spec.width, auto_map=AUTO_MAP, architectures=["NevVisionModel"])
    config.dtype = "float32"
    config.save_pretrained(folder)
    state = {f"encoder.{name}": tensor.contiguous().cpu() for name, tensor in model.vision.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    make_image_processor(spec).save_pretrained(folder)
    (folder / "modeling_nev.py").write_text(make_modeling_file(__version__), encoding="utf-8")

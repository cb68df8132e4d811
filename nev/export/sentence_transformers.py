"""The format `sentence-transformers`: both towers in one folder, and a router that picks one by the kind of input.

Where timm alone can compute the vision tower, the folder needs nothing but sentence-transformers and timm. Else it has the model
of the format `hf`, which works after `import nev`.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    LayerNorm,
    Normalize,
    Pooling,
    Router,
    Transformer,
)
from torch import nn

from nev.config.model_spec import ModelError, ModelSpec
from nev.export.card import write_card
from nev.export.hf import WEIGHTS, write_vision
from nev.export.parts import (
    FP16,
    FP32,
    SENTENCES,
    Check,
    Options,
    compare,
    embed_squares,
    make_image_processor,
    normalise_squares,
    picture_limit,
    sample_pictures,
    write_spec,
    write_text_tower,
)
from nev.export.timm_tower import list_linears, wrap_trunk
from nev.inference.load import load
from nev.inference.model import Model

CONSUMER = "sentence-transformers"
MODELING_FILE = "modeling_nev.py"
TEXT, PICTURES = "text_0_Transformer", "image_0_Transformer"  # as the router names the folders of its first modules


class Pictures(NamedTuple):
    """The route of pictures.

    modules: of sentence-transformers, from pixels to unit vectors.
    weights: as `ModelSpec.weights`.
    spec: what the weights are in nev.
    plain: whether they load without nev.
    """

    modules: list[Any]
    weights: dict[str, dict[str, str]]
    spec: ModelSpec
    plain: bool


def write(model: Model, folder: Path, options: Options) -> list[Check]:
    """Write the folder, and compare what sentence-transformers and nev compute from it.

    Raises ModelError for a text encoder with code of its own.
    """
    with TemporaryDirectory() as scratch:
        pictures = _make_pictures(model, Path(scratch))
        router = Router({"text": _make_texts(model, Path(scratch)), "image": pictures.modules}, allow_empty_key=False)
        whole = SentenceTransformer(
            modules=[router], prompts=model.spec.prompts, similarity_fn_name="cosine", device="cpu"
        )
        whole.save_pretrained(str(folder), create_model_card=False)
        if not pictures.plain:
            shutil.copy(
                Path(scratch) / "nev" / MODELING_FILE, folder / MODELING_FILE
            )  # transformers looks for code in the folder itself
    described = replace(model, spec=pictures.spec, load_text=lambda: model.text)
    write_spec(described, folder, pictures.weights, TEXT)
    write_card(model, folder, "sentence-transformers", options, plain=pictures.plain)
    return _check(model, folder, pictures.plain)


def _make_texts(model: Model, scratch: Path) -> list[Any]:
    """The route of texts, from tokens to unit vectors."""
    if type(model.text.model).__module__.startswith("transformers_modules"):
        raise ModelError(
            f"format sentence-transformers: the text encoder {model.spec.text.encoder} has code of its own, which this folder "
            "would need: give the format hf"
        )
    write_text_tower(model, scratch / "text")
    transformer = Transformer(
        str(scratch / "text"),
        max_seq_length=model.text.longest,
        modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        module_output_name="token_embeddings",
    )
    pooler = getattr(transformer.model, "pooler", None)
    if isinstance(
        pooler, nn.Module
    ):  # of BERT, which nothing here uses: zeros, and not random numbers, go into the file
        for parameter in pooler.parameters():
            nn.init.zeros_(parameter)
    width = model.text.width
    norm = [LayerNorm(width)] if model.text.layer_norm else []
    return [transformer, Pooling(width, "cls" if model.text.pooling == "cls" else "mean"), *norm, Normalize()]


def _make_pictures(model: Model, scratch: Path) -> Pictures:
    """The route of pictures: without nev where that gives the model's vectors, else with it."""
    plain = _make_plain(model, scratch / "timm")
    if plain is not None and _compare_pixels(model, plain.modules).passed:
        return plain
    write_vision(model, scratch / "nev")
    modules = [_open_pictures(scratch / "nev")]
    return Pictures(modules, {f"{PICTURES}/{WEIGHTS}": {"encoder.": ""}}, model.spec, plain=False)


def _make_plain(model: Model, scratch: Path) -> Pictures | None:
    """The route of pictures by timm and linear layers. None where timm has no such model."""
    wrapper = wrap_trunk(model.vision, model.spec)
    if wrapper is None:
        return None
    wrapper.save_pretrained(scratch)
    make_image_processor(model.spec).save_pretrained(scratch)
    weights = {f"{PICTURES}/{WEIGHTS}": {"timm_model.": "trunk.", "timm_model.attn_pool.": "pool."}}
    if model.spec.vision.pool == "own":
        weights = {f"{PICTURES}/{WEIGHTS}": {"timm_model.": "trunk."}}
    layers = []
    for number, linear in enumerate(list_linears(model.vision), start=1):
        out, features = linear.weight.shape
        activation = nn.GELU() if linear.gelu else None
        layers.append(
            Dense(features, out, linear.bias is not None, activation, init_weight=linear.weight, init_bias=linear.bias)
        )
        weights[f"image_{number}_Dense/{WEIGHTS}"] = {"linear.": f"{linear.name}."}
    # The first layer has taken in what standardises the features, so nev.load must not do that again.
    vision = model.spec.vision.model_copy(update={"standardise": False})
    spec = model.spec.model_copy(update={"vision": vision})
    return Pictures([_open_pictures(scratch), *layers, Normalize()], weights, spec, plain=True)


def _open_pictures(folder: Path) -> Any:
    """A model of transformers, as sentence-transformers reads it from a folder."""
    return Transformer(
        str(folder),
        modality_config={"image": {"method": "forward", "method_output_name": "pooler_output"}},
        module_output_name="sentence_embedding",
    )


def _compare_pixels(model: Model, modules: list[Any]) -> Check:
    """Compare what modules without nev compute with what the model computes."""
    squares = sample_pictures(model.spec.image_size)
    features: dict[str, Any] = {
        "pixel_values": torch.from_numpy(normalise_squares(model, squares)),
        "modality": "image",
    }
    with torch.inference_mode():
        for module in modules:
            features = module.eval()(features)
    theirs = features["sentence_embedding"].numpy()
    return compare(CONSUMER, "pixels", theirs, embed_squares(model, squares), *_limit(model, plain=True))


def _limit(model: Model, plain: bool) -> tuple[float, bool]:
    """Limit of a comparison of pictures, and whether it is one of cosines: timm does not round features to float16."""
    return (FP16, True) if plain and model.spec.vision.lock else (picture_limit(model), False)


def _check(model: Model, folder: Path, plain: bool) -> list[Check]:
    """Open the folder as its users do, and compare with the model."""
    squares = sample_pictures(model.spec.image_size)
    pictures = embed_squares(model, squares)
    opened = SentenceTransformer(str(folder), device="cpu")
    vectors = opened.encode([Image.fromarray(square) for square in squares], modality="image")
    checks = [compare(CONSUMER, "pictures", vectors, pictures, *_limit(model, plain))]
    for kind in model.spec.prompts:
        vectors = opened.encode(list(SENTENCES), prompt_name=kind, modality="text")
        checks.append(compare(CONSUMER, f"{kind} texts", vectors, model.encode_text(SENTENCES, kind=kind), FP32))  # type: ignore[call-overload]
    again = load(folder, device="cpu")
    checks.append(compare("nev.load", "pictures", embed_squares(again, squares), pictures, picture_limit(model)))
    texts = again.encode_text(SENTENCES), model.encode_text(SENTENCES)
    return [*checks, compare("nev.load", "texts", *texts, FP32)]

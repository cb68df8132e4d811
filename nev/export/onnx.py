"""The format `onnx`: both towers for ONNX Runtime in three precisions, and a reader that needs neither nev nor torch.

vision/ text/        model.onnx (float32), model_fp16.onnx, model_int8.onnx
openvino/            the float32 graphs in OpenVINO's form, where that package is installed
preprocessing.json   what a runtime has to do before and after: pixels, prompts, files
tokenizer.json       of the text tower, with its longest text and its padding
reader.py            does all of it
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from nev.export.card import write_card
from nev.export.onnx_graph import OUTPUT, copy_vision, write_float16, write_int8, write_text_graph, write_vision_graph
from nev.export.parts import (
    FP16,
    FP32,
    FROZEN_FP16,
    INT8,
    SENTENCES,
    TEXT_FOLDER,
    Check,
    Options,
    compare,
    embed_squares,
    picture_limit,
    sample_pictures,
    write_spec,
)
from nev.export.single_file import make_reader_file
from nev.export.templates import reader
from nev.inference.model import Model
from nev.inference.tokenizer import make_tokenizer
from nev.models.image_encoder import ImageEncoder
from nev.ops.vectors import Floats

VISION, OPENVINO = "vision", "openvino"
TOKENIZER, PREPROCESSING = "tokenizer.json", "preprocessing.json"
FILES = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "int8": "model_int8.onnx"}
SMALLER: dict[str, Callable[[Path, Path], None]] = {"fp16": write_float16, "int8": write_int8}
# Without the empty text: int8 moves it further than any text that says something (all-MiniLM-L6-v2: 1 - cosine of 0.022, and
# of 0.007 for 200 captions of Flickr8k, 0.012 at most).
TEXTS = tuple(text for text in SENTENCES if text)
# Pictures of a forward on a CPU, whose activations stay in the cache. EVA02-B/16 at 224 px by ONNX Runtime on one core of an
# Intel server: 350 ms a picture one at a time, 375 ms at 4, 405 ms at 16, 440 ms at 32; int8 107, 133, 150, 180 ms.
FORWARD_PIXELS, MOST_PICTURES = 4 * 224**2, 32
BF16 = 0.01  # largest 1 - cosine between a locked trunk in bfloat16, as it was trained behind, and in float32


def write(model: Model, folder: Path, options: Options) -> list[Check]:
    """Write the folder, and compare what ONNX Runtime and OpenVINO compute from it.

    The float32 graphs must agree. Another form that does not is left out, which the checks and README.md say.
    """
    openvino = importlib.util.find_spec("openvino") is not None
    checks, _ = write_runtime(model, folder, options, tuple(FILES), openvino)
    write_spec(model, folder, {}, TEXT_FOLDER if options.text else None)
    write_card(model, folder, "onnx", options)
    with (folder / "README.md").open("a", encoding="utf-8") as card:
        card.write(_describe_files(folder, checks))
    return checks


def write_runtime(
    model: Model, folder: Path, options: Options, precisions: tuple[str, ...], openvino: bool
) -> tuple[list[Check], dict[str, Floats]]:
    """Write the graphs and what `reader.py` needs, and compare what they compute.

    precisions: some of FILES, `fp32` first. openvino: that package's form, too.
    Returns the comparisons, and for each tower the vectors that the float32 graph must give of the samples.
    """
    vision = copy_vision(model)
    ours, checks = _embed_samples(model, vision, options)
    for tower in ours:
        (folder / tower).mkdir()
    write_vision_graph(vision, model.spec.image_size, folder / VISION / FILES["fp32"])
    if options.text:
        write_text_graph(model, folder / TEXT_FOLDER / FILES["fp32"])
        make_tokenizer(model.text).save(str(folder / TOKENIZER))
    for precision in precisions[1:]:
        for tower in ours:
            SMALLER[precision](folder / tower / FILES["fp32"], folder / tower / FILES[precision])
    (folder / "reader.py").write_text(make_reader_file(), encoding="utf-8")
    _write_preprocessing(model, folder)
    for tower, vectors in ours.items():
        limits = _find_limits(model, tower)
        checks += _compare_tower(folder, tower, vectors, {precision: limits[precision] for precision in precisions})
        if openvino:
            check = compare("openvino", f"{tower}, fp32", _run_openvino(folder, tower), vectors, limits["fp32"])
            checks.append(_leave_out(check, folder / OPENVINO, tower))
    _write_preprocessing(model, folder)  # without what was left out
    return checks, ours


def _embed_samples(model: Model, vision: ImageEncoder, options: Options) -> tuple[dict[str, Floats], list[Check]]:
    """The model's vectors of the samples, float32 [n, D], for each tower that is written. vision: `copy_vision` of the model.

    A locked trunk that ran in bfloat16 is compared in float32, as the graph computes, and with itself in bfloat16.
    """
    squares = sample_pictures(model.spec.image_size)
    ours, checks = {VISION: embed_squares(model, squares)}, []
    if model.vision.bf16:
        exact = embed_squares(replace(model, vision=vision, device=torch.device("cpu")), squares)
        checks = [compare("float32", "vision, in place of bfloat16", exact, ours[VISION], BF16, by_cosine=True)]
        ours[VISION] = exact
    if options.text:
        ours[TEXT_FOLDER] = model.encode_text(TEXTS)
    return ours, checks


def _find_limits(model: Model, tower: str) -> dict[str, float]:
    """For each precision the limit of a comparison: of the largest difference for fp32, of 1 - cosine for the others."""
    if tower == VISION:
        return {"fp32": picture_limit(model), "fp16": FROZEN_FP16 if model.spec.vision.lock else FP16, "int8": INT8}
    return {"fp32": FP32, "fp16": FP16, "int8": INT8}


def _compare_tower(folder: Path, tower: str, ours: Floats, limits: dict[str, float]) -> list[Check]:
    """Compare what `reader.py` computes with the model's vectors, in each precision of `limits` (`_find_limits`)."""
    checks = []
    for precision, limit in limits.items():
        what, theirs = f"{tower}, {precision}", _run_reader(folder, tower, precision)
        if precision == "fp32":
            checks.append(compare("onnxruntime", what, theirs, ours, limit))
        else:
            check = compare("onnxruntime", what, theirs, ours, limit, by_cosine=True)
            checks.append(_leave_out(check, folder / tower, FILES[precision]))
    return checks


def _run_reader(folder: Path, tower: str, precision: str) -> Any:
    model = reader.Model(folder, precision)
    return (model.encode_text if tower == TEXT_FOLDER else model.encode_image)(_samples(model, tower))


def _run_openvino(folder: Path, tower: str) -> Any:
    """Write a graph in OpenVINO's form, and run it. (`ovc`, its usual tool, would report its use over the network.)"""
    import openvino

    core, file, model = openvino.Core(), folder / OPENVINO / f"{tower}.xml", reader.Model(folder)
    file.parent.mkdir(exist_ok=True)
    openvino.save_model(core.read_model(folder / tower / FILES["fp32"]), file, compress_to_fp16=False)
    compiled = core.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled((model.read_tokens if tower == TEXT_FOLDER else model.read_pixels)(_samples(model, tower)))[OUTPUT]


def _samples(model: reader.Model, tower: str) -> list[Any]:
    """What `_embed_samples` embeds, as a user gives it."""
    pictures = sample_pictures(model.config["image"]["size"])
    return list(TEXTS) if tower == TEXT_FOLDER else [Image.fromarray(square) for square in pictures]


def _leave_out(check: Check, folder: Path, name: str) -> Check:
    """Remove the files of a form that does not agree. name: the beginning of their names."""
    if check.passed:
        return check
    for file in folder.glob(f"{name}*"):
        file.unlink()
    return check._replace(left_out=True)


def _write_preprocessing(model: Model, folder: Path) -> None:
    """Write what a runtime has to know beside the graphs, and which files are there."""
    spec = model.spec
    files = {
        tower: {form: f"{tower}/{name}" for form, name in FILES.items() if (folder / tower / name).is_file()}
        for tower in (VISION, TEXT_FOLDER)
    }
    image = {
        "size": spec.image_size,
        "crop": "centre square of the upright picture, before the resize",
        "resample": "bicubic, antialiased",
        "transparent": "over white",
        "scale": 1 / 255,
        "mean": spec.mean,
        "std": spec.std,
        "layout": "float32 [b, 3, size, size], red, green, blue",
        "batch": min(MOST_PICTURES, max(1, FORWARD_PIXELS // spec.image_size**2)),
        "max_bytes": spec.limits.max_bytes,
        "max_pixels": spec.limits.max_pixels,
    }
    text = None
    if files[TEXT_FOLDER]:
        text = {"tokenizer": TOKENIZER, "max_tokens": model.text.longest, "prompts": spec.prompts}
    raw = {
        "name": spec.name,
        "width": spec.width,
        "logit_scale": spec.logit_scale,
        "image": image,
        "text": text,
        "files": files,
    }
    (folder / PREPROCESSING).write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")


def _describe_files(folder: Path, checks: list[Check]) -> str:
    """The section of README.md on the files: sizes, and the differences that were measured."""
    rows = [
        f"| {check.consumer} | {check.what} | {check.difference:.1e} | {check.gap:.1e} |"
        f" {'left out: too far from the model' if check.left_out else ''} |"
        for check in checks
    ]
    sizes = [
        f"- `{file.relative_to(folder)}`: {file.stat().st_size / 1e6:,.1f} MB"
        for file in sorted(folder.glob("*/*"))
        if file.suffix in (".onnx", ".data", ".bin")
    ]
    return "\n".join(
        [
            "\n\n## Files\n",
            "Inputs: `pixel_values`, float32 `[b, 3, S, S]`, normalised; `input_ids` and `attention_mask`, int64 `[b, T]`.",
            "Output: `embedding`, float32 `[b, D]`, of unit length, in every precision. `preprocessing.json` has the rest.",
            "The int8 graphs are for processors with integer products (VNNI or AMX). Run them one row at a time, as `reader.py`",
            "does: a forward has one scale for all its rows, so a vector would depend on the rows beside it.\n",
            *sizes,
            "\nHeld against the model when this folder was written:\n",
            "| opened by | compared | largest difference | 1 - cosine | |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )

"""A server's engine on ONNX Runtime: a folder that `nev export --format onnx` wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nev.common.errors import NevError
from nev.config.data import Limits
from nev.config.model_spec import ModelError, read_spec
from nev.ops.vectors import Floats
from nev.serve.engine import Engine
from nev.serve.texts import Ints, make_text_encoder

OUTPUT = "embedding"  # of both graphs
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class MissingPackage(NevError, ImportError):
    """A package of an extra is not installed."""


def open_onnx(folder: Path, precision: str, device: str | None, threads: int) -> Engine:
    """Open both graphs. Arguments as `open_engine`. Raises ModelError for a form that the folder does not have."""
    try:
        import onnxruntime
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingPackage(f"{folder} is an ONNX export: pip install 'nev[export]' ({error})") from error

    spec = read_spec(folder)
    config = json.loads((folder / "preprocessing.json").read_text(encoding="utf-8"))
    place = device or "cpu"
    provider = PROVIDERS.get(place)
    if provider not in onnxruntime.get_available_providers():
        raise ModelError(
            f"--device {place!r}: this ONNX Runtime has {', '.join(onnxruntime.get_available_providers())}"
        )

    def open_graph(tower: str, form: str) -> Callable[[dict[str, Any]], Floats]:
        files = config["files"].get(tower) or {}
        if form not in files:
            there = f"it has {', '.join(files)}" if files else "it was exported with --no-text"
            raise ModelError(
                f"{folder}: no {tower} graph in {form}; {there}. Export the model again, or choose another"
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors alone: float16 on a CPU would give warnings
        options.intra_op_num_threads = threads
        # Threads that spin between their parts of the work would take the cores from decoding and from the other tower.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(str(folder / files[form]), options, [provider])

        def run(inputs: dict[str, Any]) -> Floats:
            vectors: Floats = session.run([OUTPUT], inputs)[0]
            return vectors

        return run

    run_text, run_vision = open_graph("text", "fp32"), open_graph("vision", precision)
    tokenizer = Tokenizer.from_file(str(folder / config["text"]["tokenizer"]))

    def forward_texts(ids: Ints, mask: Ints) -> Floats:
        return run_text({"input_ids": ids, "attention_mask": mask})

    return Engine(
        name=spec.name,
        runtime=f"ONNX Runtime on {place}",
        precision=precision,
        width=spec.width,
        image_size=spec.image_size,
        limits=Limits(max_bytes=config["image"]["max_bytes"], max_pixels=config["image"]["max_pixels"]),
        fingerprint=spec.vision_fingerprint,
        text_fingerprint=spec.document_fingerprint,
        encode_images=_make_image_encoder(run_vision, config["image"], precision),
        encode_texts=make_text_encoder(tokenizer, config["text"]["prompts"], forward_texts),
    )


def _make_image_encoder(
    run: Callable[[dict[str, Any]], Floats], config: dict[str, Any], precision: str
) -> Callable[[NDArray[np.uint8]], Floats]:
    """Squares, uint8 [b, S, S, 3], to vectors, in forwards of the size that the export says is fast.

    int8 runs one picture at a time: a forward has one scale for all its rows, so a vector would depend on the pictures of other
    callers beside it. One at a time is no slower: EVA02-B/16 takes 107 ms a picture, and 133 ms in fours (`nev.export.onnx`).
    """
    mean, std = (np.array(config[name], np.float32) for name in ("mean", "std"))
    scale, shift = 1 / (255 * std), -mean / std
    size = 1 if precision == "int8" else int(config["batch"])

    def encode(pixels: NDArray[np.uint8]) -> Floats:
        parts = (pixels[start : start + size] for start in range(0, len(pixels), size))
        return np.concatenate(
            [
                run({"pixel_values": np.ascontiguousarray((part * scale + shift).transpose(0, 3, 1, 2), np.float32)})
                for part in parts
            ]
        )

    return encode

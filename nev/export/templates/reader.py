"""Pictures and sentences to unit vectors, by the files of this folder. Needs onnxruntime, numpy, Pillow and tokenizers alone.

from reader import Model

model = Model("PATH OF THIS FOLDER")
scores = model.encode_text(["a dog in the snow"]) @ model.encode_image(["photo.jpg"]).T
"""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer

from nev.data.colour import NoColour, to_rgb

# Formats that Pillow may open. EPS is not among them: for it, Pillow would start another program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
DAMAGED_EXIF = (SyntaxError, ValueError, LookupError, OSError, TypeError, OverflowError, struct.error)


class BadImage(ValueError):
    """A picture that cannot be used. The message says why."""


class Model:
    """Both towers. A tower is loaded when it is first used.

    folder: of this file. precision: `fp32`, `fp16` or `int8`. providers: of ONNX Runtime.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        precision: str = "fp32",
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        self.folder, self.precision, self.providers = Path(folder), precision, list(providers)
        self.config = json.loads((self.folder / "preprocessing.json").read_text(encoding="utf-8"))
        self.width: int = self.config["width"]

    def encode_image(self, images: Any, batch_size: int | None = None) -> Any:
        """Embed pictures: paths, bytes of files or Pillow images -> float32 [n, D]. Raises BadImage with its number.

        batch_size: pictures of a forward. None: as many as are fast on a CPU; with int8 one.
        """
        given = [images] if isinstance(images, str | os.PathLike | bytes | Image.Image) else list(images)
        size = batch_size or self._usual_batch(self.config["image"]["batch"])
        parts = (self.read_pixels(given[start : start + size], start) for start in range(0, len(given), size))
        return self._run(self._vision, parts)

    def encode_text(self, texts: str | Iterable[str], kind: str = "query", batch_size: int | None = None) -> Any:
        """Embed sentences as a `query` or a `document` -> float32 [n, D]. A text is never taken for a path or URL.

        batch_size: sentences of a forward. None: 64; with int8 one.
        """
        given = [texts] if isinstance(texts, str) else list(texts)
        size = batch_size or self._usual_batch(64)
        parts = (self.read_tokens(given[start : start + size], kind) for start in range(0, len(given), size))
        return self._run(self._text, parts)

    def _usual_batch(self, fast: int) -> int:
        """Dynamic int8 has one scale for all rows of a forward: beside other rows, the vector of a row would be another."""
        return 1 if self.precision == "int8" else fast

    def read_pixels(self, images: Iterable[Any], first: int = 0) -> dict[str, Any]:
        """What the vision graph takes: pixel_values, float32 [b, 3, S, S]. first: number of the first picture, for BadImage."""
        config = self.config["image"]
        mean, std = (np.array(config[name], np.float32) for name in ("mean", "std"))
        pixels = []
        for number, image in enumerate(images, first):
            try:
                pixels.append(read_square(image, config))
            except BadImage as error:
                raise BadImage(f"picture {number}: {error}") from error
        squares = np.stack(pixels)
        return {"pixel_values": np.ascontiguousarray(((squares / np.float32(255) - mean) / std).transpose(0, 3, 1, 2))}

    def read_tokens(self, texts: Iterable[str], kind: str = "query") -> dict[str, Any]:
        """What the text graph takes: input_ids and attention_mask, int64 [b, T]."""
        prompts = self.config["text"]["prompts"]
        if kind not in prompts:
            raise ValueError(f"kind {kind!r}: it is {' or '.join(prompts)}")
        rows = self._tokenizer.encode_batch([prompts[kind] + text for text in texts])
        mask = np.array([row.attention_mask for row in rows], np.int64)
        return {"input_ids": np.array([row.ids for row in rows], np.int64), "attention_mask": mask}

    def _run(self, session: onnxruntime.InferenceSession, batches: Iterable[dict[str, Any]]) -> Any:
        empty = np.zeros((0, self.width), np.float32)
        return np.concatenate([empty, *(session.run(["embedding"], batch)[0] for batch in batches)])

    @cached_property
    def _vision(self) -> onnxruntime.InferenceSession:
        return self._open("vision")

    @cached_property
    def _text(self) -> onnxruntime.InferenceSession:
        return self._open("text")

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self.folder / self.config["text"]["tokenizer"]))  # it cuts and pads, too

    def _open(self, tower: str) -> onnxruntime.InferenceSession:
        files = self.config["files"].get(tower, {})
        if self.precision not in files:
            raise ValueError(
                f"{self.folder}: {tower} is not here in {self.precision!r}, but in {list(files)}; see README.md"
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors alone: float16 on a CPU would give warnings
        return onnxruntime.InferenceSession(str(self.folder / files[self.precision]), options, self.providers)


def read_square(source: Any, config: dict[str, Any]) -> Any:
    """A picture as the tower sees it, upright: the centre square, resized -> uint8 [S, S, 3]. Raises BadImage.

    source: path, bytes of a file, or Pillow image. config: `image` of preprocessing.json.
    """
    try:
        image = source if isinstance(source, Image.Image) else _open_file(source, config["max_bytes"])
        if image.width * image.height > config["max_pixels"]:
            raise BadImage(f"the picture has {image.width}x{image.height} pixels, more than {config['max_pixels']:,}")
        image = to_rgb(turn_upright(image))
    except NoColour as error:
        raise BadImage(str(error)) from error
    except BadImage:
        raise
    except Exception as error:  # Pillow raises whatever its plugins raise
        raise BadImage(f"not a picture: {type(error).__name__}: {error}") from error
    size, side = config["size"], min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


def _open_file(source: Any, most: int) -> Image.Image:
    count = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
    if count > most:
        raise BadImage(f"the picture has {count:,} bytes, more than {most:,}")
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)


def turn_upright(image: Image.Image) -> Image.Image:
    """Turn a picture by its EXIF data. Pillow turns a TIFF itself."""
    try:
        return image if image.format == "TIFF" else ImageOps.exif_transpose(image)
    except DAMAGED_EXIF:
        return image

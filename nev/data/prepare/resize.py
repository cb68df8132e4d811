"""Shrinks pictures before they are written to shards, so that training reads and decodes less."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Annotated, Literal

from pydantic import Field

from nev.config.base import Positive, Section
from nev.config.data import Limits
from nev.data.decode import BadImage, read_header, shrink_for
from nev.data.rows import Row

AHEAD = 16  # rows that are read ahead for each thread
LOSSLESS = "PNG"  # format of shrunk pictures that came neither as JPEG nor as WebP


class Resize(Section):
    """How pictures are shrunk."""

    side: Positive
    """Shorter side of a shrunk picture, in pixels."""
    format: Literal["keep", "jpeg", "webp"] = "keep"
    """Format of shrunk pictures. `keep`: JPEG and WebP stay as they are, and other formats become PNG."""
    quality: Annotated[int, Field(ge=1, le=100)] = 90
    """Quality of shrunk JPEG and WebP pictures, 1 to 100."""


def resize_image(
    rows: Iterable[Row], resize: Resize, limits: Limits, dropped: Counter[str], threads: int = 1
) -> Iterator[Row]:
    """Yield the rows in their order, with large pictures shrunk. A row whose picture cannot be shrunk is counted in `dropped`.

    A picture whose shorter side is at most `resize.side` keeps its bytes, whatever its format.
    """
    rows = iter(rows)
    with ThreadPoolExecutor(threads) as pool:  # Pillow and libjpeg-turbo release the GIL
        while chunk := list(islice(rows, AHEAD * threads)):
            images = pool.map(partial(shrink, resize=resize, limits=limits), (row["image"] or b"" for row in chunk))
            for row, image in zip(chunk, images, strict=True):
                if image is None:
                    dropped["image can't be resized"] += 1
                else:
                    yield {**row, "image": image}


def shrink(image: bytes, resize: Resize, limits: Limits) -> bytes | None:
    """Encode the picture upright, with its shorter side at `resize.side`. None where it cannot be decoded or encoded."""
    from PIL import Image

    try:
        header = read_header(image, limits)
        height, width = header.height, header.width
        short = min(height, width)
        if short <= resize.side:
            return image
        # A JPEG is decoded at a fraction that is at least twice the final size. The antialiased filter then gives a picture that
        # looks as if the JPEG had been decoded at its full size.
        picture = Image.fromarray(header.pixels(shrink_for(height, width, 2 * resize.side)))
    except BadImage:
        return None
    size = (max(1, round(width * resize.side / short)), max(1, round(height * resize.side / short)))
    same_format = header.format if header.format in ("JPEG", "WEBP") else LOSSLESS
    target = same_format if resize.format == "keep" else resize.format.upper()
    options = {} if target == LOSSLESS else {"quality": resize.quality}
    out = io.BytesIO()
    try:
        picture.resize(size, Image.Resampling.BICUBIC).save(out, target, **options)
    except (OSError, ValueError):  # the longer side exceeds the format's maximum: 16,383 for WebP, 65,500 for JPEG
        return None
    return out.getvalue()

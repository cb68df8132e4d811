"""Make pictures smaller on their way into a shard, so that training reads and decodes less."""

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

AHEAD = 16  # rows in work for each thread
LOSSLESS = "PNG"  # for what is neither JPEG nor WebP


class Resize(Section):
    """side: pixels of the shorter side afterwards. format: `keep` stays with JPEG and WebP, and makes PNG of the rest."""

    side: Positive
    format: Literal["keep", "jpeg", "webp"] = "keep"
    quality: Annotated[int, Field(ge=1, le=100)] = 90


def resize_image(
    rows: Iterable[Row], resize: Resize, limits: Limits, dropped: Counter[str], threads: int = 1
) -> Iterator[Row]:
    """Pass on the rows in their order, larger pictures made smaller; one that can't be is dropped and counted.

    A picture whose shorter side is no longer than `resize.side` keeps its bytes, whatever its format.
    """
    rows = iter(rows)
    with ThreadPoolExecutor(threads) as pool:  # Pillow and libjpeg-turbo let go of the interpreter while they work
        while chunk := list(islice(rows, AHEAD * threads)):
            images = pool.map(partial(shrink, resize=resize, limits=limits), (row["image"] or b"" for row in chunk))
            for row, image in zip(chunk, images, strict=True):
                if image is None:
                    dropped["image can't be resized"] += 1
                else:
                    yield {**row, "image": image}


def shrink(image: bytes, resize: Resize, limits: Limits) -> bytes | None:
    """Encoded bytes of the picture with its shorter side at `resize.side`, upright; None where it can't be decoded or encoded."""
    from PIL import Image

    try:
        header = read_header(image, limits)
        height, width = header.height, header.width
        short = min(height, width)
        if short <= resize.side:
            return image
        # Twice the size is left to the antialiased kernel, so that a JPEG decoded at a fraction looks like one that was not.
        picture = Image.fromarray(header.pixels(shrink_for(height, width, 2 * resize.side)))
    except BadImage:
        return None
    size = (max(1, round(width * resize.side / short)), max(1, round(height * resize.side / short)))
    kept = header.format if header.format in ("JPEG", "WEBP") else LOSSLESS
    wanted = kept if resize.format == "keep" else resize.format.upper()
    options = {} if wanted == LOSSLESS else {"quality": resize.quality}
    out = io.BytesIO()
    try:
        picture.resize(size, Image.Resampling.BICUBIC).save(out, wanted, **options)
    except (OSError, ValueError):  # a longer side beyond what the format can say: 16,383 for WebP, 65,500 for JPEG
        return None
    return out.getvalue()

"""Pillow images of any mode to RGB of 8 bits: wide grey by its range, transparent pixels over white."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

BITS, SAMPLE_FORMAT, PHOTOMETRIC = 258, 339, 262  # tags of a TIFF
SIGNED, WHITE_IS_ZERO = 2, 0  # values of the second and the third
# How Pillow widens the samples of a PNG, whose transparent grey it leaves as the file has it.
WIDENED = {"L;2": 85, "L;4": 17}


class NoColour(ValueError):
    """Pixels that have no meaning as colours."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB, transparent pixels over white, grey of more than 8 bits by its whole range. Raises NoColour for floats."""
    from PIL import Image

    if image.mode == "F":
        raise NoColour("floating-point pixels have no fixed white")
    if "transparency" in image.info:
        image = _with_transparency_of_its_pixels(image)
    if image.mode.startswith("I"):
        image = _narrow(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _with_transparency_of_its_pixels(image: Image.Image) -> Image.Image:
    """The image with its transparent colour in the range of its pixels: Pillow reads it as a PNG of 2, 4 or 16 bits has it."""
    tiles = getattr(image, "tile", None)  # empty once the pixels are there
    form = tiles[0].args if tiles else ""
    colour = image.info["transparency"]
    if form in WIDENED:
        colour *= WIDENED[form]
    elif form == "RGB;16B":
        colour = tuple(value >> 8 for value in colour)
    else:
        return image
    image = image.copy()
    image.info["transparency"] = colour
    return image


def _narrow(image: Image.Image) -> Image.Image:
    """Integers of more than 8 bits to 8, with the transparent grey as alpha."""
    from PIL import Image

    tags = getattr(image, "tag_v2", {})
    wide = np.asarray(image)
    grey = Image.fromarray(_to_bytes(wide, tags))
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return grey
    alpha = Image.fromarray(np.where(wide == transparent, 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, alpha))


def _to_bytes(wide: NDArray[Any], tags: Any) -> NDArray[np.uint8]:
    """Integers to uint8. tags: of a TIFF.

    Integers of 32 bits have no usual range: the largest one tells ranges of 8, 16 and 31 bits apart.
    """
    bits = int(tags.get(BITS, (16,))[0])
    if bits == 32:
        largest = int(wide.max(initial=0))
        bits = 8 if largest < 2**8 else 16 if largest < 2**16 else 31
    elif tags.get(SAMPLE_FORMAT, (1,))[0] == SIGNED:
        bits -= 1
    narrow = (wide.clip(0, 2**bits - 1) >> (bits - 8)).astype(np.uint8)
    return 255 - narrow if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else narrow

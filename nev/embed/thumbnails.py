"""A picture as the tower sees it and as a page shows it, decoded once."""

from __future__ import annotations

import numpy as np

from nev.config.data import Limits
from nev.data.augment import eval_view
from nev.data.decode import BadImage, Picture, bad_image_for_any_error, read_header
from nev.inference.pictures import Square

QUALITY = 85


def make_views(data: bytes, size: int, limits: Limits, thumbnail: int) -> tuple[Square, bytes | None]:
    """The square of `size` pixels a side that the tower sees, and the thumbnail; None without one, and for a bad picture.

    thumbnail: its longest side, in pixels; 0: none.
    """
    out: Picture = np.zeros((size, size, 3), np.uint8)
    try:
        image = read_header(data, limits)
        if not thumbnail:
            eval_view(image, out)
            return Square(out, ""), None
        whole = image.pixels(1)
        eval_view(image._replace(pixels=lambda shrink: whole), out)
        return Square(out, ""), make_thumbnail(whole, thumbnail)
    except BadImage as error:
        out[:] = 0
        return Square(out, str(error)), None


@bad_image_for_any_error()
def make_thumbnail(picture: Picture, side: int) -> bytes:
    """A JPEG of the picture, uint8 [h, w, 3], at most `side` pixels long. Nothing is enlarged, and no metadata are copied."""
    import simplejpeg
    from PIL import Image

    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    encoded: bytes = simplejpeg.encode_jpeg(np.array(image), quality=QUALITY, colorsubsampling="420")
    return encoded

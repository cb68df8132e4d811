"""A contact sheet: some pictures of a shard with their captions, as one PNG, so that a person can check the data."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from nev.config.data import Limits
from nev.data.decode import BadImage, read_header, shrink_for
from nev.data.rows import Row, parse_captions
from nev.storage.files import filesystem, open_parquet
from nev.storage.reading import CUT_SHORT, read_errors_as_data_errors

if TYPE_CHECKING:
    from PIL import Image

COLUMNS, ROWS = 8, 6
CELLS = COLUMNS * ROWS
CELL, GAP, LINE, LINES = 128, 8, 12, 3  # pixels, pixels, pixels, lines of a caption
FONT_SIZE, LINE_CHARACTERS = 10, 24


def read_first_rows(shard: str) -> list[Row]:
    """The first 48 rows of `shard` (path or URL). The order of rows is random, so these are a sample of the set."""
    with (
        read_errors_as_data_errors(shard, CUT_SHORT),
        open_parquet(*filesystem(shard)) as raw,
        pq.ParquetFile(raw) as file,
    ):
        rows: list[Row] = next(file.iter_batches(CELLS, columns=["uid", "image", "caption"])).to_pylist()
    return rows


def draw_contact_sheet(batch: Sequence[Row], limits: Limits) -> bytes:
    """Rows as a PNG, 48 at most. The cell of a picture that cannot be decoded is grey, with the reason for the caption."""
    from PIL import Image, ImageDraw, ImageFont

    step_x, step_y = CELL + GAP, CELL + LINE * LINES + GAP
    lines_down = -(-len(batch) // COLUMNS)
    sheet = Image.new("RGB", (GAP + min(len(batch), COLUMNS) * step_x, GAP + lines_down * step_y), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for number, row in enumerate(batch):
        x, y = GAP + number % COLUMNS * step_x, GAP + number // COLUMNS * step_y
        picture, text = _cell(row["image"] or b"", parse_captions(row["caption"])[0], limits)
        sheet.paste(picture, (x + (CELL - picture.width) // 2, y + (CELL - picture.height) // 2))
        lines = textwrap.wrap(text, LINE_CHARACTERS, max_lines=LINES, placeholder=" …")
        draw.text((x, y + CELL), "\n".join(lines), "black", font, spacing=1)
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def _cell(image: bytes | memoryview, caption: str, limits: Limits) -> tuple[Image.Image, str]:
    from PIL import Image, ImageOps

    try:
        header = read_header(image, limits)
        picture = Image.fromarray(header.pixels(shrink_for(header.height, header.width, CELL)))
    except BadImage as error:
        return Image.new("RGB", (CELL, CELL), "lightgrey"), str(error)
    return ImageOps.contain(picture, (CELL, CELL)), caption

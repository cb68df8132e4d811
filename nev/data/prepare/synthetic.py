"""A set of captioned pictures that needs no network: coloured shapes in groups, on varied backgrounds.

A picture holds one to three copies of one shape in one colour, as a group at the left, right, top, bottom or in the middle. The
class is "<colour> <shape>". The caption also names the number, the place, and sometimes the background. Train and val have the
same classes but different templates, so no val caption equals a train caption.

`render` is a pure function of (index, seed, split): rows can be drawn in any order and in any process.
"""

from __future__ import annotations

import io
import math
import multiprocessing
import random
from bisect import bisect
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageOps

from nev.config.base import ConfigError
from nev.data.prepare.pipeline import PrepareReport, Progress, prepare
from nev.data.prepare.shards import Layout
from nev.data.rows import Row
from nev.data.sources.common import make_source
from nev.storage.files import join

Point = tuple[float, float]
RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (222, 36, 44),
    "orange": (250, 128, 20),
    "yellow": (250, 214, 20),
    "green": (36, 170, 64),
    "blue": (40, 96, 232),
    "purple": (146, 52, 190),
}


def _circle_points(count: int, *radii: float) -> list[Point]:
    """Points around the centre, the first at the top. Point k lies at radius number k mod len(radii)."""
    turns = [(2 * math.pi * k / count, radii[k % len(radii)]) for k in range(count)]
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for angle, radius in turns]


def _ring(outer: float, inner: float) -> list[Point]:
    """One outline along the outer circle and back along the inner circle, so that the hole stays open."""
    rim, hole = _circle_points(40, outer), _circle_points(40, inner)
    return [*rim, rim[0], hole[0], *hole[::-1]]


# Outlines inside the circle of radius 1, y downwards.
SHAPES: dict[str, list[Point]] = {
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0, -0.95), (1.0, 0.8), (-1.0, 0.8)],
    "star": _circle_points(10, 1.08, 0.45),
    "ring": _ring(0.96, 0.56),
    "cross": [(-0.27, -1), (0.27, -1), (0.27, -0.27), (1, -0.27), (1, 0.27), (0.27, 0.27),
              (0.27, 1), (-0.27, 1), (-0.27, 0.27), (-1, 0.27), (-1, -0.27), (-0.27, -0.27)],
}  # fmt: skip
CLASSES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
NUMBERS = ("one", "two", "three")
NUMBER_ODDS = (1 / 2, 5 / 6)  # cumulative: half of the pictures have one copy, a third two, a sixth three
TONES = ("light", "dark")
GROUNDS = ("plain", "gradient", "spotty", "striped", "checked")

PLACES = {
    "train": {
        "left": "on the left",
        "right": "on the right",
        "top": "at the top",
        "bottom": "at the bottom",
        "middle": "in the middle",
    },
    "val": {
        "left": "near the left edge",
        "right": "near the right edge",
        "top": "along the upper edge",
        "bottom": "along the lower edge",
        "middle": "in the centre",
    },
}
# {things}: "a red circle", "three red circles". No sentence of one split can be a sentence of the other.
TEMPLATES = {
    "train": (
        "{things} {place}",
        "a picture of {things} {place}",
        "{things} {place} of a {ground} picture",
        "a {ground} background with {things} {place}",
        "a drawing of {things}",
    ),
    "val": (
        "an image that shows {things} {place}",
        "{things}, placed {place}, over a {ground} backdrop",
        "somebody drew {things} {place}",
    ),
}
SIDES = (72, 200)  # pixels
SUPERSAMPLE = 2
PICTURE_BYTES = 5_000  # rough size of a picture


class Scene(NamedTuple):
    """The content of a picture, and its caption."""

    label: int
    number: int
    place: str
    tone: str
    ground: str
    caption: str


def describe(index: int, seed: int, split: str) -> Scene:
    """The scene of row `index`. The class is index mod len(CLASSES), so len(CLASSES) consecutive rows have each class once."""
    rng = random.Random(f"scene/{seed}/{split}/{index}")
    label = index % len(CLASSES)
    colour, shape = CLASSES[label].split()
    number, place = 1 + bisect(NUMBER_ODDS, rng.random()), rng.choice(list(PLACES[split]))
    tone, ground = rng.choice(TONES), rng.choice(GROUNDS)
    things = f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"
    if number > 1:
        things = f"{NUMBERS[number - 1]} {colour} {shape}{'es' if shape.endswith('s') else 's'}"
    template = rng.choice(TEMPLATES[split])
    caption = template.format(things=things, place=PLACES[split][place], ground=f"{tone} {ground}")
    return Scene(label, number, place, tone, ground, caption)


def render(index: int, seed: int, split: str) -> Row:
    """Row `index` of a split ("train" or "val"). The same arguments give the same bytes.

    The image is a JPEG of quality 60 to 95, with sides of 72 to 200 px and a ratio of at most 6:5.
    """
    scene = describe(index, seed, split)
    rng = random.Random(f"pixels/{seed}/{split}/{index}")
    short = rng.randint(SIDES[0], SIDES[1] * 5 // 6)
    long = int(short * rng.uniform(1.0, 1.2))
    width, height = (short, long) if rng.random() < 0.5 else (long, short)
    image = _background(rng, (width * SUPERSAMPLE, height * SUPERSAMPLE), scene.tone, scene.ground)
    colour, shape = CLASSES[scene.label].split()
    _draw_group(rng, image, COLOURS[colour], SHAPES[shape], scene.number, scene.place)
    encoded = io.BytesIO()
    image.reduce(SUPERSAMPLE).save(encoded, "JPEG", quality=rng.randint(60, 95))
    return {
        "uid": f"{split}-{seed}-{index:08d}",
        "image": encoded.getvalue(),
        "caption": scene.caption,
        "label": scene.label,
        "label_name": CLASSES[scene.label],
    }


def _background(rng: random.Random, size: tuple[int, int], tone: str, ground: str) -> Image.Image:
    """An RGB image of `size`: two greyish tints of one tone, blended by a grey pattern."""
    low, high = (176, 212) if tone == "light" else (16, 48)
    if ground == "plain":
        return Image.new("RGB", size, _tint(rng, low, high))
    if ground == "gradient":
        side = max(size) * 3 // 2
        pattern = Image.linear_gradient("L").rotate(rng.uniform(0, 360), Image.Resampling.BILINEAR)
        pattern = pattern.crop((38, 38, 218, 218)).resize((side, side)).crop((0, 0, *size))
    elif ground == "spotty":
        cells = rng.randint(8, 16)
        pattern = Image.frombytes("L", (cells, cells), rng.randbytes(cells * cells))
        pattern = pattern.resize(size, Image.Resampling.BICUBIC)
    else:
        columns, rows = (rng.randint(5, 9), 1) if ground == "striped" else (rng.randint(5, 8), rng.randint(5, 8))
        if ground == "striped" and rng.random() < 0.5:
            columns, rows = rows, columns
        cells_grey = bytes(255 * ((column + row) % 2) for row in range(rows) for column in range(columns))
        pattern = Image.frombytes("L", (columns, rows), cells_grey).resize(size, Image.Resampling.NEAREST)
    middle = (low + high) // 2
    return ImageOps.colorize(pattern, _tint(rng, low, middle - 4), _tint(rng, middle + 4, high))


def _tint(rng: random.Random, low: int, high: int) -> RGB:
    level = rng.randint(low, high)
    red, green, blue = (max(0, min(255, level + rng.randint(-9, 9))) for _ in range(3))
    return red, green, blue


def _draw_group(
    rng: random.Random, image: Image.Image, colour: RGB, outline: list[Point], number: int, place: str
) -> None:
    """Draw `number` copies of a shape in one colour at `place`, evenly spaced with some jitter."""
    width, height = image.size
    short = min(width, height)
    cell = short * {1: rng.uniform(0.56, 0.64), 2: 0.47, 3: 0.325}[number] * rng.uniform(0.94, 1)
    tall = place in ("left", "right") or (place == "middle" and rng.random() < 0.5)
    spots = [(0.0, k - (number - 1) / 2) if tall else (k - (number - 1) / 2, 0.0) for k in range(number)]
    near = max(0.22, 0.55 * cell / short)  # distance from an edge as a share of the side, still inside a centred crop
    free = (number == 1) * 0.04
    along, across = rng.uniform(0.5 - free, 0.5 + free), rng.uniform(near, near + 0.03)
    x, y = {
        "left": (across, along),
        "right": (1 - across, along),
        "top": (along, across),
        "bottom": (along, 1 - across),
        "middle": (rng.uniform(0.47, 0.53), rng.uniform(0.47, 0.53)),
    }[place]
    fill = tuple(max(0, min(255, channel + rng.randint(-10, 10))) for channel in colour)
    draw = ImageDraw.Draw(image)
    for dx, dy in spots:
        angle, radius = rng.uniform(-0.08, 0.08), cell / 2 * rng.uniform(0.9, 0.96)
        centre_x = x * width + (dx + rng.uniform(-0.03, 0.03)) * cell
        centre_y = y * height + (dy + rng.uniform(-0.03, 0.03)) * cell
        points = _transform(outline, (centre_x, centre_y), 0.86 * radius, angle)
        # A white rim makes the edge of an object look the same on every background.
        draw.line([*points, *points[:2]], fill=(255, 255, 255), width=round(0.24 * radius), joint="curve")
        draw.polygon(points, fill=fill)


def _transform(outline: list[Point], centre: Point, radius: float, angle: float) -> list[Point]:
    """The outline, rotated by `angle` (radians), scaled by `radius` and moved to `centre`."""
    sine, cosine = radius * math.sin(angle), radius * math.cos(angle)
    return [(centre[0] + cosine * x - sine * y, centre[1] + sine * x + cosine * y) for x, y in outline]


def render_all(count: int, seed: int, split: str, processes: int = 1) -> Iterator[Row]:
    """Rows 0 to count - 1 of a split, in order. processes: number of processes that draw."""
    row = partial(render, seed=seed, split=split)
    if processes == 1:
        yield from map(row, range(count))
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would copy Arrow's locks, some of them locked
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        yield from pool.map(row, range(count), chunksize=64)


def write_synthetic(
    folder: str | Path,
    *,
    train: int,
    val: int,
    seed: int = 0,
    processes: int = 1,
    layout: Layout | None = None,
    progress: Progress | None = None,
) -> dict[str, PrepareReport]:
    """Write folder/train, folder/val (parquet shards) and folder/classes.txt. Returns the report of each split.

    train, val: pictures of a split, at least len(CLASSES), so that every class is in both.

    The other settings are those of `render_all` and `nev.data.prepare.pipeline.prepare`. Raises ConfigError for too few pictures,
    and where shards exist and `layout.overwrite` is not set.
    """
    counts = {"train": train, "val": val}
    for split, count in counts.items():
        if count < len(CLASSES):
            raise ConfigError(f"{split}: {count} pictures cannot show all {len(CLASSES)} classes; ask for more")
    return {
        split: prepare(
            make_source(
                render_all(count, seed, split, processes),
                nbytes=count * PICTURE_BYTES,
                spec={"source": "synthetic", "split": split, "pictures": count},
            ),
            join(str(folder), split),
            seed=seed,
            layout=layout,
            progress=progress,
        )
        for split, count in counts.items()
    }

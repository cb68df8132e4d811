"""Real photographs, damaged in 2,400 ways: no crash, no hang, no short block, and the rows beside them are untouched."""

import random
from pathlib import Path

import numpy as np
import pytest
from helpers.blocks import embedded, reader_of
from helpers.pictures import encoded, mutated, write_shard
from PIL import Image

from nev.config.data import Augment, Limits
from nev.data.plan import Plan

MUTATIONS, WHOLE, BLOCK = 2400, 600, 64
KINDS = (("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True}))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_damaged_photographs_never_break_a_block(data_folder: Path, tmp_path: Path) -> None:
    rng = random.Random(6)
    sources = []
    for number, path in enumerate(sorted((data_folder / "imagenet_sample").iterdir())[:60]):
        image = Image.open(path).convert("RGB")
        image.thumbnail((160, 160))
        kind, options = KINDS[number % len(KINDS)]
        sources.append(encoded(image, kind, **options))
    sources += [path.read_bytes() for path in sorted((data_folder / "satellite/cloudy").iterdir())[:12]]  # CMYK
    rows = [
        {"uid": f"torn-{n}", "image": mutated(sources[n % len(sources)], rng), "caption": f"torn {n}"}
        for n in range(MUTATIONS)
    ]
    rows += [{"uid": f"whole-{n}", "image": sources[n % len(sources)], "caption": f"whole {n}"} for n in range(WHOLE)]
    rng.shuffle(rows)
    write_shard(tmp_path / "torn/0.parquet", rows, [500] * 6)
    write_shard(tmp_path / "whole/0.parquet", [row for row in rows if row["uid"].startswith("whole")], [WHOLE])

    torn = read_all(tmp_path / "torn")
    assert len(torn["uid"]) == (MUTATIONS + WHOLE) // BLOCK * BLOCK
    good = np.array([uid.startswith("whole") for uid in torn["uid"]])
    assert torn["valid"][good].all()
    bad = ~torn["valid"]
    assert MUTATIONS // 4 < bad.sum() < MUTATIONS
    assert all(torn["reason"][bad])
    assert not torn["image"][bad].any()

    alone = read_all(tmp_path / "whole")
    place = {uid: row for row, uid in enumerate(torn["uid"])}
    both = [row for row, uid in enumerate(alone["uid"]) if uid in place]
    assert len(both) > WHOLE - 3 * BLOCK
    for name in ("image", "text", "valid"):
        assert np.array_equal(alone[name][both], torn[name][[place[alone["uid"][row]] for row in both]])


def read_all(folder: Path) -> dict[str, np.ndarray]:
    """Every block of the first epoch, one after another; each has its R rows."""
    index = embedded(folder)
    reader = reader_of(index, augment=Augment(scale=(0.3, 1.0), flip=True), limits=Limits(max_pixels=4_000_000))
    plan = Plan(index.rows, 0, BLOCK, BLOCK)
    blocks = [next(reader.read_blocks(plan.make_window(number))) for number in range(plan.blocks_per_epoch)]
    assert {len(block[name]) for block in blocks for name in block} == {BLOCK}
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}

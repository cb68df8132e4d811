"""The synthetic set: pure rows, honest captions, visible objects, splits that share classes and no sentence."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nev.config.base import ConfigError
from nev.data.prepare.synthetic import (
    CLASSES,
    COLOURS,
    PLACES,
    TEMPLATES,
    describe,
    render,
    render_all,
    write_synthetic,
)
from nev.data.rows import Row


def pixels(row: Row) -> np.ndarray:
    assert row["image"]
    return np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB"), dtype=float)


def test_render_is_a_pure_function_of_index_seed_and_split() -> None:
    assert render(5, 0, "train") == render(5, 0, "train")
    images = {render(5, seed, split)["image"] for seed in (0, 1) for split in ("train", "val")}
    assert len(images | {render(5 + len(CLASSES), 0, "train")["image"]}) == 5


def test_processes_do_not_change_the_rows() -> None:
    assert list(render_all(130, 3, "val", processes=2)) == [render(k, 3, "val") for k in range(130)]


def test_captions_of_val_never_occur_in_train() -> None:
    said = {split: {describe(index, 0, split).caption for index in range(20_000)} for split in TEMPLATES}
    assert len(said["train"]) > 1000
    assert len(said["val"]) > 1000
    assert not {s.lower() for s in said["train"]} & {s.lower() for s in said["val"]}
    assert not set(TEMPLATES["train"]) & set(TEMPLATES["val"])


def test_every_class_comes_equally_often_and_is_named_in_its_caption() -> None:
    for split in TEMPLATES:
        rows = list(render_all(2 * len(CLASSES), 0, split))
        assert Counter(row.get("label") for row in rows) == dict.fromkeys(range(len(CLASSES)), 2)
        for row in rows:
            label = row.get("label")
            assert isinstance(label, int)
            assert row.get("label_name") == CLASSES[label]
            assert CLASSES[label] in str(row["caption"])
            assert "a orange" not in str(row["caption"])


def test_pictures_vary_in_size_and_are_jpegs() -> None:
    sizes = set()
    for row in render_all(200, 0, "train"):
        assert row["image"]
        image = Image.open(io.BytesIO(row["image"]))
        assert (image.format, image.mode) == ("JPEG", "RGB")
        assert min(image.size) >= 72
        assert max(image.size) <= 200
        assert max(image.size) <= 1.21 * min(image.size)
        sizes.add(image.size)
    assert len(sizes) > 150


def test_the_object_is_large_has_its_colour_and_is_where_the_caption_says() -> None:
    checked = Counter[str]()
    for row in render_all(400, 0, "train"):
        image, caption = pixels(row), str(row["caption"])
        colour = np.array(COLOURS[str(row.get("label_name")).split()[0]], dtype=float)
        mask = np.abs(image - colour).max(axis=2) < 48
        assert mask.mean() > 0.02, caption
        y, x = np.percentile(np.argwhere(mask) / image.shape[:2], (2, 98), axis=0).mean(axis=0)
        shown = {"left": x < 0.43, "right": x > 0.57, "top": y < 0.43, "bottom": y > 0.57}
        shown["middle"] = abs(x - 0.5) < 0.07 and abs(y - 0.5) < 0.07
        for place, phrase in PLACES["train"].items():
            if phrase in caption:
                assert shown[place], f"{caption}: its colour is at ({x:.2f}, {y:.2f})"
                checked[place] += 1
    assert min(checked[place] for place in PLACES["train"]) > 30


def test_the_number_of_objects_is_the_number_in_the_caption() -> None:
    """Counts what lies on one line through the group: runs of the object's colour along the axis of the group."""
    for row in render_all(400, 0, "train"):
        caption, image = str(row["caption"]), pixels(row)
        colour, shape = str(row.get("label_name")).split()
        places = [place for place, phrase in PLACES["train"].items() if phrase in caption and place != "middle"]
        if shape not in ("ring", "square") or not places:
            continue
        mask = np.abs(image - COLOURS[colour]).max(axis=2) < 60  # type: ignore[operator]
        line = mask.mean(axis=1 if places[0] in ("left", "right") else 0) > 0.06
        runs = int((np.diff(np.concatenate([[0], line.astype(int)])) == 1).sum())
        said = {"two": 2, "three": 3}
        assert runs == next((n for word, n in said.items() if word in caption.split()), 1), caption


def test_write_synthetic_makes_both_splits_and_the_classes(tmp_path: Path) -> None:
    reports = write_synthetic(tmp_path / "set", train=72, val=30, seed=0)
    assert {split: report.rows_written for split, report in reports.items()} == {"train": 72, "val": 30}
    assert (tmp_path / "set/classes.txt").read_text().splitlines() == CLASSES
    val = pq.read_table(tmp_path / "set/val")
    assert sorted(val["label"].to_pylist()) == list(range(30))
    assert val.to_pylist() != sorted(val.to_pylist(), key=lambda row: row["uid"])
    with pytest.raises(ConfigError, match="cannot show all 30 classes"):
        write_synthetic(tmp_path / "few", train=72, val=10)
    with pytest.raises(ConfigError, match="already holds 1 shard"):
        write_synthetic(tmp_path / "set", train=72, val=36)

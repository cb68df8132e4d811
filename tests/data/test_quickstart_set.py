"""The quickstart's pictures: drawn where nothing is, kept where they are, and never over files of the user."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.pictures import rows_of, write_shard

from nev.config.base import ConfigError
from nev.config.data import Data
from nev.data.index import WORK_FOLDER
from nev.data.prepare.quickstart import RECORD, draw_missing_splits


def data(folder: Path | str, **changed: object) -> Data:
    return Data(**{"train": f"{folder}/train", "val": f"{folder}/val", "block_rows": 8, **changed})


def draw(folder: Path, train: int = 40, val: int = 32) -> bool:
    return draw_missing_splits(data(folder), train, val, seed=0)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_pictures_are_drawn_once_and_anew_for_other_counts(tmp_path: Path) -> None:
    assert draw(tmp_path / "set")
    first = contents(tmp_path / "set")
    assert not draw(tmp_path / "set")
    assert contents(tmp_path / "set") == first
    assert draw(tmp_path / "set", train=48)
    assert contents(tmp_path / "set") != first


def test_a_drawing_that_was_interrupted_is_drawn_again(tmp_path: Path) -> None:
    draw(tmp_path / "set")
    whole = contents(tmp_path / "set")
    record = tmp_path / "set/val" / RECORD
    record.write_text(record.read_text().replace(record.read_text().split('"shards": ')[1], "null}"))
    (tmp_path / "set/val" / WORK_FOLDER).mkdir()
    assert draw(tmp_path / "set")
    assert contents(tmp_path / "set") == whole


@pytest.mark.parametrize("missing", ["train", "val"])
def test_one_split_of_the_user_is_never_drawn_over(missing: str, tmp_path: Path) -> None:
    """Only the other split was prepared: before, both were drawn anew over it."""
    given = "val" if missing == "train" else "train"
    write_shard(tmp_path / "set" / given / "a.parquet", rows_of(8), [8])
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=f"set/{given} was not made by the quickstart"):
        draw(tmp_path / "set")
    assert contents(tmp_path) == before


def test_two_splits_of_the_user_are_trained_on_as_they_are(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_shard(tmp_path / "set" / split / "a.parquet", rows_of(8), [8])
    before = contents(tmp_path)
    assert not draw(tmp_path / "set")
    assert contents(tmp_path) == before


def test_shards_that_a_user_puts_beside_drawn_ones_are_kept(tmp_path: Path) -> None:
    draw(tmp_path / "set")
    write_shard(tmp_path / "set/train/mine.parquet", rows_of(8), [8])
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="set/train was not made by the quickstart"):
        draw(tmp_path / "set", val=40)
    assert contents(tmp_path) == before


def test_class_names_of_the_user_are_kept(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/classes.txt").write_text("cat\ndog\n")
    with pytest.raises(ConfigError, match=r"classes\.txt was not made by the quickstart"):
        draw(tmp_path / "set")
    assert (tmp_path / "set/classes.txt").read_text() == "cat\ndog\n"


def test_places_where_nothing_can_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train = 's3://b/set/train': the quickstart draws .* this machine"):
        draw_missing_splits(data("s3://b/set"), 40, 32, seed=0)
    with pytest.raises(ConfigError, match=r"data\.val = 's3://b/val'"):
        draw_missing_splits(data(tmp_path, val="s3://b/val"), 40, 32, seed=0)
    with pytest.raises(ConfigError, match=r"data\.val: the quickstart scores"):
        draw_missing_splits(data(tmp_path, val=None), 40, 32, seed=0)
    with pytest.raises(ConfigError, match="draws FOLDER/train and FOLDER/val, not"):
        draw_missing_splits(data(tmp_path, val=f"{tmp_path}/elsewhere/val"), 40, 32, seed=0)
    assert contents(tmp_path) == {}

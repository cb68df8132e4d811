"""A head for one's own captioned pictures: which pictures are held back, and the settings for few and for many."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.pictures import encoded, photo
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from nev.config.base import ConfigError
from nev.data.rows import Row
from nev.data.sources import make_source
from nev.demo.own_pictures import FEWEST, choose_rows, is_held_back, make_config, train_on


def test_each_picture_is_in_one_split_and_a_tenth_is_held_back() -> None:
    rows = [Row(uid=f"trip/{number}.jpg", image=b"", caption=None) for number in range(5000)]
    train, val = (list(choose_rows(rows, iter, held_back)) for held_back in (False, True))
    assert sorted(row["uid"] for row in train + val) == sorted(row["uid"] for row in rows)
    assert 400 < len(val) < 600
    assert is_held_back("\udcff.jpg") in (True, False), "a name that is no text"


@given(st.integers(FEWEST, 200_000))
def test_every_number_of_pictures_makes_a_run(pictures: int) -> None:
    config = make_config("mine", Path("/work"), pictures)
    batch, steps = config.train.global_batch, config.train.samples // config.train.global_batch
    assert batch <= pictures
    assert batch & (batch - 1) == 0
    assert batch <= 1024
    assert steps >= 60
    assert abs(config.train.samples - 20 * pictures) < batch
    assert config.train.eval_every == config.train.checkpoint_every == steps


def test_too_few_pictures_are_refused_before_training(tmp_path: Path) -> None:
    pixels = encoded(photo(0, width=20, height=20), "PNG")
    source = make_source([Row(uid=str(number), image=pixels, caption="a dog") for number in range(20)])
    with pytest.raises(ConfigError, match="pictures with captions to train on, and 100 are the fewest"):
        train_on(source, "few", tmp_path / "few", Console(quiet=True))

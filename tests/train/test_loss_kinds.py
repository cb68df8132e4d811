"""Runs with another loss than the plain one: they train, in parts too, and go on from their checkpoints."""

import math
from collections.abc import Callable

import pytest
import torch
from helpers.training import prepare_job, run_bare, train_reader

from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.models.text import TextTower, load_text

Make = Callable[..., Experiment]


@pytest.fixture(scope="module")
def text() -> TextTower:
    torch.set_num_threads(1)
    return load_text(Experiment.model_fields["text"].default)


@pytest.mark.slow
def test_the_sigmoid_loss_in_parts_trains_and_goes_on_from_its_checkpoint(tiny: Make, text: TextTower) -> None:
    sigmoid = {"loss__kind": "sigmoid", "loss__init_scale": 10, "train__micro_batch": 32}
    config = tiny(name="sigmoid", train__steps=6, train__checkpoint_every=3, **sigmoid)
    reported = run_bare(prepare_job(config, text, stop_after=3), train_reader(config, text))
    reported |= run_bare(prepare_job(config, text), train_reader(config, text))
    assert reported[6]["loss"] < reported[1]["loss"]
    assert reported[1]["logit_bias"] == pytest.approx(-math.log(64), abs=0.01)
    assert reported[6]["logit_bias"] != reported[3]["logit_bias"]
    whole = tiny(name="whole", train__steps=6, train__checkpoint_every=3, **sigmoid | {"train__micro_batch": None})
    expected = run_bare(prepare_job(whole, text), train_reader(whole, text))
    for step in range(1, 7):  # parts are exact, and so is going on
        assert reported[step]["loss"] == pytest.approx(expected[step]["loss"], rel=1e-4)


@pytest.mark.slow
def test_nested_widths_train_in_parts_too_and_must_end_with_the_texts(tiny: Make, text: TextTower) -> None:
    widths = {32: 0.5, text.width: 1.0}
    found = []
    for part in (None, 32):
        config = tiny(name=f"nested-{part}", loss__matryoshka=widths, train__steps=3, train__micro_batch=part)
        found.append(run_bare(prepare_job(config, text), train_reader(config, text)))
        run_bare(prepare_job(config, text), train_reader(config, text), iter(()))  # continues with nothing left
    assert found[0][1]["loss"] == pytest.approx(1.5 * math.log(64), rel=0.3)
    assert [found[0][step]["loss"] for step in (1, 2, 3)] == pytest.approx(
        [found[1][step]["loss"] for step in (1, 2, 3)], rel=1e-4
    )
    with pytest.raises(ConfigError, match=r"loss\.matryoshka: the widest must be 384, .* not 64"):
        prepare_job(tiny(loss__matryoshka={64: 1.0}), text)

"""Trunks of other families than the paper's: they train, or preflight says why they cannot."""

import math
from collections.abc import Callable

import pytest
from helpers.training import prepare_job, run_bare, train_reader

from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.models.text import TextTower, load_text
from nev.train.driver.preflight import check_inputs

Make = Callable[..., Experiment]


@pytest.fixture(scope="module")
def text() -> TextTower:
    return load_text(Experiment.model_fields["text"].default)


def vision(trunk: str, pool: str, **args: object) -> dict[str, object]:
    return {"vision__trunk": trunk, "vision__trunk_args": args, "vision__pool": pool, "eval__best": None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trunk", "pool", "args"),
    [
        ("test_efficientnet", "mean", {}),  # conv_head gives the tokens
        ("poolformerv2_s12", "map", {}),  # takes no img_size
        ("deit_tiny_distilled_patch16_224", "cls+mean", {"embed_dim": 48, "depth": 1, "num_heads": 2}),
        ("lowformer_b0", "mean", {}),  # parts behind the tokens with names of their own
    ],
)
def test_trunks_that_failed_in_a_worker_train(
    trunk: str, pool: str, args: dict[str, object], tiny: Make, text: TextTower
) -> None:
    config = tiny(name=trunk, train__steps=2, train__checkpoint_every=2, **vision(trunk, pool, **args))
    reported = run_bare(prepare_job(config, text), train_reader(config, text))
    assert all(math.isfinite(reported[step]["loss"]) for step in (1, 2))
    run_bare(prepare_job(config, text), train_reader(config, text), iter(()))  # goes on from its checkpoint


@pytest.mark.parametrize(
    ("trunk", "pool", "message"),
    [
        ("coat_tiny", "mean", r"'coat_tiny' gives a list, not tokens .*: choose vision\.pool: own"),
        ("pit_ti_224", "mean", "gives its class token alone: use pool cls or own"),
        ("efficientformer_l1", "mean", r"is not usable for pictures of 32 x 32 pixels: .*timm has it at 224"),
    ],
)
def test_preflight_refuses_a_trunk_before_a_worker_meets_it(
    trunk: str, pool: str, message: str, tiny: Make, text: TextTower
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_inputs(tiny(name="refused", **vision(trunk, pool)), text)

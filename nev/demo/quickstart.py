"""The quickstart: pictures drawn on the spot, their captions embedded, a vision encoder trained on both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from nev.config.experiment import Experiment

if TYPE_CHECKING:
    from nev.train.experiment import Summary

TRAIN, VAL = 8000, 1000  # pictures


def train_quickstart(config: Experiment, console: Console, train: int = TRAIN, val: int = VAL) -> Summary:
    """Draw the pictures that are missing, embed their captions, and train. Connects to Ray. The same call resumes.

    config: with absolute paths. train, val: pictures to train on, and to validate with.
    """
    from nev.cluster.warm_up import connecting
    from nev.common.signals import handle_sigterm
    from nev.data.prepare.quickstart import draw_missing_splits
    from nev.embed.captions import embed_captions
    from nev.train.experiment import run_experiment

    with handle_sigterm():
        with connecting(), console.status(f"drawing {train + val:,} captioned pictures"):
            drawn = draw_missing_splits(config.data, train, val, config.seed)
        if drawn:
            console.print(f"captioned pictures drawn: {train:,} to train on, {val:,} to score on", soft_wrap=True)
        embed_captions(config.data.sets, config.text, console)
        return run_experiment(config, console)

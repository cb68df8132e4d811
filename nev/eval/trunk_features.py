"""The features of a locked trunk for the pairs of a sample: load the trunk, embed on Ray, pair rows with captions."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nev.common.errors import NevError
from nev.common.progress import ProgressCallback
from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.model import Vision
from nev.config.paths import with_absolute_paths
from nev.data.block import Block
from nev.data.sample import SampleReader, picture_reader
from nev.embed.features import TOO_LARGE, make_spec
from nev.embed.images import EmbedJob, embed_all
from nev.eval.suite.vectors import Embedded, Pairs, Texts, make_pairs
from nev.models.trunk_spec import TrunkSpec

if TYPE_CHECKING:
    from nev.models.frozen import FrozenTrunk


class SampledSet(NamedTuple):
    """Drawn rows of a set, and their captions. reader: of the pictures. texts: the captions' vectors."""

    reader: SampleReader
    texts: Texts


class Shown:
    """The one progress line of all trunks. It also measures the pace.

    update: of `nev.common.progress.progress`.
    place: number of this trunk. trunks: number of trunks.
    """

    def __init__(self, update: ProgressCallback, place: int, trunks: int) -> None:
        self.update, self.place, self.trunks = update, place, trunks
        self.times: list[tuple[float, int]] = []  # (time, pictures done) at each report

    def add(self, rows: int, total: int, label: str) -> None:
        """Show that `rows` more of the `total` pictures are embedded."""
        done = rows + (self.times[-1][1] if self.times else 0)
        self.times.append((time.perf_counter(), done))
        pace = f", {self.pace():,.0f} pictures/s" if self.pace() else ""
        text = f"{label} ({self.place + 1} of {self.trunks}){pace}"
        self.update("pictures embedded", self.place * total + done, self.trunks * total, text)

    def pace(self) -> float:
        """Pictures/s since the first block with pictures, whose time holds the start of the processes; 0 before a second one."""
        blocks = [(when, done) for when, done in self.times if done]
        if len(blocks) < 2 or blocks[-1][0] == blocks[0][0]:
            return 0.0
        return (blocks[-1][1] - blocks[0][1]) / (blocks[-1][0] - blocks[0][0])


def load_trunk(spec: TrunkSpec, config: Experiment) -> tuple[Experiment, FrozenTrunk]:
    """Load a trunk, and the experiment that has this trunk: pool, size, and the trunk's own mean and deviation of pixels.

    Raises ConfigError for a trunk that cannot be built or fetched, or that takes no pictures of this size.
    """
    from nev.models.frozen import FrozenTrunk, load_frozen_trunk
    from nev.models.pools import build_pool, has_class_token

    size = spec.size or config.data.image_size
    vision = Vision(
        trunk=spec.name, weights=spec.weights, pretrained=spec.weights is None, lock="trunk", mode="online", pool="mean"
    )
    vision = with_absolute_paths(config.model_copy(update={"vision": vision})).vision
    try:
        trunk = load_frozen_trunk(vision, size)
        if has_class_token(trunk.trunk):
            vision = vision.model_copy(update={"pool": "cls+mean"})
            trunk = FrozenTrunk(trunk.trunk, build_pool(vision, trunk.trunk)[0], vision, size)
        width = trunk.shape  # one picture passes the trunk, so that a wrong size shows here
    except NevError as error:
        hint = ". On this command line a file of weights is NAME=FILE" if "pretrained" in str(error) else ""
        hint = ". On this command line NAME@SIZE names a size" if "not usable for pictures" in str(error) else hint
        raise ConfigError(f"{error}{hint}") from error
    except Exception as error:  # the code of a model of timm, or of the hub's client: each raises its own
        raise ConfigError(
            f"not usable for pictures of {size} x {size} pixels (NAME@SIZE names another size): {type(error).__name__}: {error}"
        ) from error
    if len(width) != 1:
        raise ConfigError(f"the trunk gives features of shape {list(width)}, not one vector a picture")
    published = getattr(trunk.trunk, "pretrained_cfg", None) or {}
    pixels = {name: tuple(map(float, published.get(name) or ())) for name in ("mean", "std")}
    data = config.data.model_copy(
        update={"image_size": size, **{name: own for name, own in pixels.items() if len(own) == 3}}
    )
    return config.model_copy(update={"vision": vision, "data": data}), trunk


def embed_sets(
    spec: TrunkSpec, config: Experiment, trunk: FrozenTrunk, sets: Sequence[SampledSet], shown: Shown
) -> tuple[Pairs, Pairs, Counter[str]]:
    """Embed the pictures of both sets on the connected Ray. Returns features and texts of the usable rows, and the bad rows.

    The features stand in `Pairs.images`, as the trunk gives them. Raises DataError for shards that cannot be read, ConfigError
    where no row of a set can be used.
    """
    size, batch, bad = trunk.image_size, config.eval.batch, Counter[str]()
    total = sum(each.reader.total for each in sets)
    jobs = [EmbedJob(each.reader.blocks(batch), picture_reader(each.reader, size)) for each in sets]
    shown.add(0, total, spec.label)
    on_progress: Callable[[int], None] = partial(shown.add, total=total, label=spec.label)
    rows = list(embed_all(jobs, make_spec(config, trunk), batch * size**2 * 3, on_progress))
    fitted, scored = (pair_up(block, each.texts, bad) for block, each in zip(rows, sets, strict=True))
    return fitted, scored, bad


def pair_up(block: Block | NevError, texts: Texts, bad: Counter[str]) -> Pairs:
    """The rows that have a picture, features and a caption. bad: counts the other rows, by reason."""
    if isinstance(block, NevError):
        raise block
    assert texts.owner is not None
    features: NDArray[np.float16] = block["vector"]
    finite = np.isfinite(features).all(axis=1)
    valid = block["valid"] & finite
    bad.update(filter(None, block["reason"].tolist()))
    bad[TOO_LARGE] += int((block["valid"] & ~finite).sum())
    bad["caption is empty"] += int(valid.sum() - np.isin(np.flatnonzero(valid), texts.owner).sum())
    for reason in [reason for reason, count in bad.items() if not count]:
        del bad[reason]
    return make_pairs(Embedded(features.astype(np.float32), valid, np.full(len(valid), -1)), texts)

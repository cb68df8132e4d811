"""A head behind a locked photo trunk, trained on a folder of captioned pictures: what `nev demo FOLDER` searches with.

The settings are those of the shipped experiment `flickr8k_photos`; what depends on the number of pictures is computed here. A
tenth of the pictures, chosen by uid, is held back to validate with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from nev.config.base import ConfigError
from nev.config.data import Columns
from nev.config.experiment import Experiment
from nev.config.file import load
from nev.config.paths import with_absolute_paths
from nev.data.index import WORK_FOLDER, build_index
from nev.data.prepare.pipeline import prepare
from nev.data.rows import Row
from nev.data.sources import Source
from nev.embed.captions import embed_captions
from nev.embed.features import embed_features
from nev.train.experiment import run_experiment

BASE = "flickr8k_photos"
FEWEST = 100  # pictures to train on; fewer make no batch to contrast
EPOCHS = 20


def train_on(source: Source, name: str, folder: Path, console: Console) -> str:
    """Train on the captioned pictures of a source, on the connected Ray. Returns the run. The same call resumes.

    name: of the experiment. folder: for shards and the run.
    Raises ConfigError for fewer than FEWEST pictures, and where the package of the trunk is not installed.
    """
    pictures = write_split(source, folder / "train", held_back=False)
    if pictures < FEWEST:
        raise ConfigError(
            f"{name}: {pictures} pictures with captions to train on, and {FEWEST} are the fewest. Give a folder with more, or a "
            f"model: nev demo FOLDER --model MODEL. What was prepared lies in {folder}: delete that folder first."
        )
    write_split(source, folder / "val", held_back=True)
    config = make_config(name, folder, pictures)
    embed_captions(config.data.sets, config.text, console)
    embed_features(config, console)
    run_experiment(config, console)
    return str(Path(config.output, config.name))


def write_split(source: Source, output: Path, held_back: bool) -> int:
    """Write the shards of a split, unless they are there. Returns the number of rows."""
    if not output.exists() or (output / WORK_FOLDER).exists():
        prepare(source._replace(read=partial(choose_rows, read=source.read, held_back=held_back)), output)
    return int(build_index(str(output), Columns()).rows.sum())


def choose_rows(part: Any, read: Callable[[Any], Iterable[Row]], held_back: bool) -> Iterator[Row]:
    """The rows of a part that belong to a split."""
    return (row for row in read(part) if is_held_back(row["uid"]) == held_back)


def is_held_back(uid: str) -> bool:
    """Whether a picture is for validation: the same answer in every process."""
    return hashlib.blake2b(uid.encode(errors="surrogatepass"), digest_size=8).digest()[0] < 256 // 10


def make_config(name: str, folder: Path, pictures: int) -> Experiment:
    """The experiment for a number of pictures to train on: a batch of a quarter of them, at most 1,024, and 20 epochs."""
    batch = 2 ** (min(max(pictures // 4, 16), 1024).bit_length() - 1)
    steps = EPOCHS * pictures // batch
    settings = {
        "name": name,
        "output": folder / "runs",
        "data.train": folder / "train",
        "data.val": folder / "val",
        "data.block_rows": batch,
        "train.global_batch": batch,
        "train.samples": steps * batch,
        "train.eval_every": steps,
        "train.checkpoint_every": steps,
    }
    return with_absolute_paths(load(BASE, [f"{key}={value}" for key, value in settings.items()]))

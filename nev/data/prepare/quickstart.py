"""The pictures of the quickstart. They are drawn into empty folders, and never over files that the quickstart did not make.

Each split that is drawn here has a record, `_quickstart.json`: the settings of the split and, once it is complete, the names and
sizes of its shards. A folder without the record belongs to the user.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from nev.config.base import ConfigError
from nev.config.data import Data
from nev.data.index import WORK_FOLDER
from nev.data.prepare.shards import Layout
from nev.data.prepare.synthetic import write_synthetic

RECORD = "_quickstart.json"
SPLITS = ("train", "val")


def draw_missing_splits(data: Data, train: int, val: int, seed: int) -> bool:
    """Draw the pictures of `data.train` and `data.val` unless both are there. Returns whether they were drawn.

    data: its locations are FOLDER/train and FOLDER/val on this machine.
    train, val: pictures of each split.
    Raises ConfigError for other locations, and where a folder to draw into holds files that were not drawn here.
    """
    folder = _parent_of_splits(data)
    settings = {
        split: {"pictures": count, "seed": seed, "row_group_rows": data.block_rows}
        for split, count in (("train", train), ("val", val))
    }
    states = {split: _state(folder / split, settings[split]) for split in SPLITS}
    if all(state in ("drawn", "foreign") for state in states.values()):
        return False
    foreign = [str(folder / split) for split, state in states.items() if state == "foreign"]
    if not foreign and "stale" not in states.values() and (folder / "classes.txt").exists():
        foreign = [str(folder / "classes.txt")]
    if foreign:
        raise ConfigError(
            f"{foreign[0]} was not made by the quickstart, which therefore draws nothing beside it. Prepare both "
            "data.train and data.val (nev prepare --help), or give an empty folder: --set data.train=FOLDER/train "
            "--set data.val=FOLDER/val"
        )
    for split in SPLITS:
        (folder / split).mkdir(parents=True, exist_ok=True)
        _write_record(folder / split, settings[split], None)
    layout = Layout(row_group_rows=data.block_rows, overwrite="stale" in states.values())
    write_synthetic(folder, train=train, val=val, seed=seed, layout=layout)
    for split in SPLITS:
        _write_record(folder / split, settings[split], _shards(folder / split))
    return True


def _parent_of_splits(data: Data) -> Path:
    train_location = data.only_set("the quickstart").location
    for name, location in (("data.train", train_location), ("data.val", data.val)):
        if location and "://" in location:
            raise ConfigError(f"{name} = {location!r}: the quickstart draws its pictures into a folder of this machine")
    if data.val is None:
        raise ConfigError("data.val: the quickstart scores what it trains; name a folder for unseen pictures")
    train, val = Path(train_location), Path(data.val)
    if train.parent != val.parent or (train.name, val.name) != SPLITS:
        if _shards(train) and _shards(val):
            return train.parent
        raise ConfigError(
            f"the quickstart draws FOLDER/train and FOLDER/val, not data.train = {train_location!r} and data.val = {data.val!r}"
        )
    return train.parent


def _state(split: Path, settings: dict[str, Any]) -> Literal["absent", "drawn", "stale", "foreign"]:
    """The state of a split's folder.

    absent: the folder is missing or empty.
    drawn: it holds the pictures of these settings.
    stale: it holds pictures of other settings, or an unfinished split, of the quickstart.
    foreign: it holds files of the user.
    """
    if not split.exists() or not any(split.iterdir()):
        return "absent"
    try:
        record = json.loads((split / RECORD).read_text(encoding="utf-8"))
        drawn_with, shards = record["settings"], record["shards"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return "foreign"
    if shards is not None and shards != _shards(split):
        return "foreign"  # the user has put files there later
    return "drawn" if shards and drawn_with == settings and not (split / WORK_FOLDER).exists() else "stale"


def _shards(split: Path) -> dict[str, int]:
    """Size in bytes of each parquet file of a folder, by name."""
    return {path.name: path.stat().st_size for path in sorted(split.glob("*.parquet"))}


def _write_record(split: Path, settings: dict[str, Any], shards: dict[str, int] | None) -> None:
    (split / RECORD).write_text(json.dumps({"settings": settings, "shards": shards}, indent=1), encoding="utf-8")

"""A trunk as the command line names it: NAME, NAME=WEIGHTS, NAME@SIZE or NAME=WEIGHTS@SIZE."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nev.config.base import ConfigError

FORM = "write NAME, NAME=WEIGHTS, NAME@SIZE or NAME=WEIGHTS@SIZE"
FOLDER = "local-dir:"  # timm's prefix of a folder that has the model's config and weights
LARGEST_SIZE = 4096  # pixels


class TrunkSpec(NamedTuple):
    """A trunk and its weights.

    label: the trunk as the user has written it.
    name: of timm, with timm's prefixes `hf-hub:` and `local-dir:`.
    weights: a file or a pip package. None: timm's, from the hub or the folder.
    size: side of the pictures, in pixels. None: the config's.
    """

    label: str
    name: str
    weights: str | None
    size: int | None


def parse_trunk(text: str) -> TrunkSpec:
    """Parse a trunk. Raises ConfigError, with advice, for a text that has another form.

    Digits behind the last `@` are the size. Every other `@` belongs to the name (`hf-hub:OWNER/NAME@REVISION`) or to the file.
    The first `=` ends the name, so a file may have `=` in its name. All of a `local-dir:` is a folder, `=` included.
    """
    body, at, size = text.strip().rpartition("@")
    if not at or re.search(r"[^0-9]", size):
        body, at, size = text.strip(), "", ""
    if at and not 1 <= int(size or 0) <= LARGEST_SIZE:
        raise ConfigError(
            f"trunk {text!r}: the size behind the last @ is a number of pixels from 1 to {LARGEST_SIZE}, not {size or 'empty'}. "
            "A revision of digits alone needs a size behind it: hf-hub:OWNER/NAME@REVISION@224"
        )
    name, equals, weights = (body, "", "") if body.startswith(FOLDER) else body.partition("=")
    if not name or name.endswith(":") or (equals and not weights):
        raise ConfigError(f"trunk {text!r}: {'WEIGHTS are' if name and equals else 'NAME is'} missing: {FORM}")
    if ":" not in name and "@" in name:
        raise ConfigError(f"trunk {text!r}: the size is a number of pixels at the end, such as NAME=WEIGHTS@224")
    if ":" not in name and ("/" in name or "\\" in name):
        raise ConfigError(
            f"trunk {text!r}: {name!r} is no name of timm. A model of the hub is hf-hub:{name}, a folder is "
            f"local-dir:{name}, a file of weights is NAME={name}"
        )
    if name.startswith(FOLDER):  # Ray's processes have other working folders
        name = FOLDER + str(Path(name.removeprefix(FOLDER)).expanduser().absolute())
    return TrunkSpec(text.strip(), name, weights or None, int(size) if at else None)


def parse_trunks(texts: Sequence[str]) -> list[TrunkSpec]:
    """Parse several trunks. Raises ConfigError as `parse_trunk`, and for a trunk that is named twice."""
    specs = [parse_trunk(text) for text in texts]
    labels = [spec.label for spec in specs]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ConfigError(f"named twice: {', '.join(twice)}")
    return specs

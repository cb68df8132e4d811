"""ImageNet's 1,000 class names and 80 templates (Radford et al. 2021), as open_clip has them."""

from __future__ import annotations

import importlib.util
from typing import Any

from nev.config.base import ConfigError


def read_names() -> tuple[str, ...]:
    """The class names in the order of the labels. Raises ConfigError where open_clip is not installed."""
    return tuple(map(str, _open_clip().IMAGENET_CLASSNAMES))


def read_templates() -> tuple[str, ...]:
    """The templates, each with one `{}`. Raises ConfigError where open_clip is not installed."""
    return tuple(template("{}") for template in _open_clip().OPENAI_IMAGENET_TEMPLATES)


def _open_clip() -> Any:
    if importlib.util.find_spec("open_clip") is None:
        raise ConfigError("the names and templates of ImageNet come from open_clip: pip install 'nev[eval]'")
    from open_clip import zero_shot_metadata

    return zero_shot_metadata

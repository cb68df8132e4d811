"""Small tars, as the tests of readers need them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def tar_of(path: Path, members: Mapping[str, bytes | str | Mapping[str, Any]], mode: str = "w") -> Path:
    """A tar with these members; a mapping is written as JSON."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            text = json.dumps(content) if isinstance(content, Mapping) else content
            raw = text.encode() if isinstance(text, str) else text
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return path

"""Hashes of plain data."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def hash_recipe(recipe: dict[str, Any]) -> str:
    """sha256 (hex) of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()

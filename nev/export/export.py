"""Writes a model in the form of another tool, opens what was written with that tool, and compares the vectors.

A folder is written beside its place, checked, and moved there whole. On S3 `nev.json` comes last: without it an export is not
whole.
"""

from __future__ import annotations

import importlib
import os
import time
from typing import NamedTuple

from nev.common.quiet import quiet_transformers
from nev.config.model_spec import SPEC_FILE, ModelError
from nev.export.formats import FORMATS, check_export
from nev.export.parts import Check, Options
from nev.inference.model import Model
from nev.storage.files import storage_errors_as, whole_folder

DEFAULTS = Options()


class Exported(NamedTuple):
    """What was written.

    location: of the folder. bytes: its size. checks: the comparisons with the model itself. seconds: that it took.
    """

    location: str
    bytes: int
    checks: list[Check]
    seconds: float


def export(model: Model, name: str, location: str | os.PathLike[str], options: Options = DEFAULTS) -> Exported:
    """Write a model to `location`, a folder or S3 prefix, in the form `name` (one of FORMATS).

    Raises ModelError for an unknown form, for a location where nothing can be written or that is not empty, and where the
    consumer's vectors are not the model's.
    """
    location = os.fspath(location)
    check_export(name, location, options.text)
    began = time.perf_counter()
    with storage_errors_as(location, "written"), whole_folder(location, SPEC_FILE) as folder, quiet_transformers():
        checks: list[Check] = importlib.import_module(FORMATS[name].module).write(model, folder, options)
        if bad := [check for check in checks if not (check.passed or check.left_out)]:
            raise ModelError(
                f"format {name}: the vectors are not the model's: {'; '.join(map(str, bad))}. Nothing was written."
            )
        files = [file for file in folder.rglob("*") if file.is_file()]
        for file in files:  # transformers writes weights that their owner alone can read
            file.chmod((folder / SPEC_FILE).stat().st_mode)
        size = sum(file.stat().st_size for file in files)
    return Exported(location, size, checks, time.perf_counter() - began)

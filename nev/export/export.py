"""Writes a model in the form of another tool, opens what was written with that tool, and compares the vectors.

A folder is written beside its place, checked, and moved there whole. On S3 `nev.json` comes last: without it an export is not
whole.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from pathlib import Path
from typing import NamedTuple

from nev.common.errors import first_few
from nev.common.quiet import quiet_transformers
from nev.config.model_spec import SPEC_FILE, ModelError
from nev.export.parts import Check, Options
from nev.inference.model import Model
from nev.storage.files import filesystem, is_local, list_files, storage_errors_as, whole_folder


class Format(NamedTuple):
    """A form of export.

    module: has `write(model, folder, options) -> list[Check]`.
    needs: packages beyond nev's own dependencies. extra: of nev, which has them.
    """

    module: str
    needs: tuple[str, ...] = ()
    extra: str = ""


FORMATS = {
    "hf": Format("nev.export.hf"),
    "sentence-transformers": Format("nev.export.sentence_transformers"),
    "onnx": Format("nev.export.onnx", ("onnx", "onnxscript", "onnxruntime"), "export"),
    "mlflow": Format("nev.export.mlflow", ("onnx", "onnxscript", "onnxruntime"), "export"),
    "nomic": Format("nev.export.nomic"),
}


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
    check_export(name, location)
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


def check_export(name: str, location: str) -> None:
    """Check what can be checked before the model is there.

    Raises ModelError for an unknown form or a missing package, and for a place that is no folder or prefix, or is not empty.
    """
    form = FORMATS.get(name)
    if form is None:
        raise ModelError(f"format {name!r}: it is one of {', '.join(FORMATS)}")
    if missing := [package for package in form.needs if importlib.util.find_spec(package) is None]:
        raise ModelError(f"format {name} needs {', '.join(missing)}: pip install 'nev[{form.extra}]'")
    if not location.strip() or ("://" in location and not location.startswith("s3://")):
        raise ModelError(f"output {location!r}: give a new folder, or s3://BUCKET/PREFIX")
    fs, path = filesystem(location)
    with storage_errors_as(location, "listed"):
        if is_local(fs) and Path(path).exists() and not Path(path).is_dir():
            raise ModelError(f"output {location} is a file: give a new folder")
        there = list_files(location)
    if there:
        broken = "" if is_local(fs) or SPEC_FILE in there else f", no {SPEC_FILE}: an upload has broken off there"
        raise ModelError(f"{location} is not empty ({first_few(there)}{broken}): give a new folder, or remove this one")

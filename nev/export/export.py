"""Writes a model in the form of another tool, opens what was written with that tool, and compares the vectors.

An export is whole or absent: it is written beside its place, checked, and moved there.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from typing import NamedTuple

from nev.common.quiet import quiet_transformers
from nev.config.model_spec import SPEC_FILE, ModelError
from nev.export.parts import Check, Options
from nev.inference.model import Model
from nev.storage.files import list_files, storage_errors_as, whole_folder


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

    Raises ModelError for an unknown form, for a location that is not empty, and where the consumer's vectors are not the model's.
    """
    location, form = os.fspath(location), FORMATS.get(name)
    if form is None:
        raise ModelError(f"format {name!r}: it is one of {', '.join(FORMATS)}")
    if missing := [package for package in form.needs if importlib.util.find_spec(package) is None]:
        raise ModelError(f"format {name} needs {', '.join(missing)}: pip install 'nev[{form.extra}]'")
    with storage_errors_as(location, "listed"):
        if there := list_files(location):
            raise ModelError(f"{location} is not empty ({there[0]}): give a new folder, or remove this one")
    began = time.perf_counter()
    with storage_errors_as(location, "written"), whole_folder(location) as folder, quiet_transformers():
        checks: list[Check] = importlib.import_module(form.module).write(model, folder, options)
        if bad := [check for check in checks if not (check.passed or check.left_out)]:
            raise ModelError(
                f"format {name}: the vectors are not the model's: {'; '.join(map(str, bad))}. Nothing was written."
            )
        files = [file for file in folder.rglob("*") if file.is_file()]
        for file in files:  # transformers writes weights that their owner alone can read
            file.chmod((folder / SPEC_FILE).stat().st_mode)
        size = sum(file.stat().st_size for file in files)
    return Exported(location, size, checks, time.perf_counter() - began)

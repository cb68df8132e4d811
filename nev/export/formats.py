"""The forms of an export, and what can be checked before a model is opened. Light: neither torch nor a model is imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

from nev.common.errors import first_few
from nev.config.model_spec import SPEC_FILE, ModelError
from nev.storage.files import filesystem, is_local, list_files, storage_errors_as


class Format(NamedTuple):
    """A form of export.

    module: has `write(model, folder, options) -> list[Check]`.
    needs: packages beyond nev's own dependencies. extra: of nev, which has them.
    both_towers: the form cannot leave out the text tower.
    """

    module: str
    needs: tuple[str, ...] = ()
    extra: str = ""
    both_towers: bool = False


RUNTIME = ("onnx", "onnxscript", "onnxruntime")
FORMATS = {
    "hf": Format("nev.export.hf"),
    "sentence-transformers": Format("nev.export.sentence_transformers", both_towers=True),
    "onnx": Format("nev.export.onnx", RUNTIME, "export"),
    "mlflow": Format("nev.export.mlflow", RUNTIME, "export"),
    "nomic": Format("nev.export.nomic"),
}


def check_export(name: str, location: str, text: bool = True) -> None:
    """Check the form and the place of an export. name: one of FORMATS. text: whether the text tower is written, too.

    Raises ModelError for an unknown form or a missing package, and for a place that is no folder or prefix, or is not empty.
    """
    form = FORMATS.get(name)
    if form is None:
        raise ModelError(f"format {name!r}: it is one of {', '.join(FORMATS)}")
    if missing := [package for package in form.needs if importlib.util.find_spec(package) is None]:
        raise ModelError(f"format {name} needs {', '.join(missing)}: pip install 'nev[{form.extra}]'")
    if form.both_towers and not text:
        raise ModelError(f"format {name} has both towers in one folder: leave out --no-text, or give hf")
    _check_place(location)


def _check_place(location: str) -> None:
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

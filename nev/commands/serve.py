"""`nev serve`: a model and an index behind HTTP.

nev serve --model runs/quickstart --index index
"""

from __future__ import annotations

import signal
import threading
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from nev.common.cli import Revision, TextEncoder, TrustRemoteCode, report_errors
from nev.config.model_spec import ModelError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from nev.serve.settings import Settings

EXAMPLE = "--model runs/quickstart"
MIB = 2**20


def main(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="A run, a checkpoint, an exported folder (onnx, too) or released weights: a folder, s3://..., or a name on "
            "the hub.",
        ),
    ],
    index: Annotated[
        str | None,
        typer.Option(
            "--index", help="Index to search: a folder or s3:// prefix of LanceDB or parquet, or postgresql://..."
        ),
    ] = None,
    table: Annotated[str, typer.Option("--table", help="Table of the index.")] = "items",
    host: Annotated[
        str, typer.Option("--host", help="Address to listen at. The default is reached from here alone.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen at; 0 takes a free one.")
    ] = 8000,
    token_file: Annotated[
        str | None,
        typer.Option(
            "--token-file", help="File with the bearer token that callers need. Default: NEV_TOKEN, where it is set."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the model in requests and answers.")] = None,
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            help="Of pictures: fp32; bf16, fp16 on a GPU, or for an onnx folder fp16 or int8. Texts are fp32.",
        ),
    ] = "fp32",
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda, ... Default: a GPU where there is one.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="CPU threads of a forward. Default: the cores of this process."),
    ] = None,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Fetch pictures from http and https addresses of the public web.")
    ] = False,
    max_body: Annotated[int, typer.Option("--max-body", min=1, help="Most MiB of a request.")] = 64,
    max_items: Annotated[int, typer.Option("--max-items", min=1, help="Most texts and pictures of a request.")] = 2048,
    max_characters: Annotated[int, typer.Option("--max-characters", min=1, help="Most characters of a text.")] = 65_536,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", min=1, help="Texts, and pictures, that may wait; then callers get 429.")
    ] = 512,
    max_texts: Annotated[int, typer.Option("--max-texts", min=1, help="Most texts of a forward.")] = 64,
    max_pictures: Annotated[int, typer.Option("--max-pictures", min=1, help="Most pictures of a forward.")] = 16,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            help="Another name of this server, such as a proxy's; may be repeated. Without a token a local server answers to "
            "localhost alone.",
        ),
    ] = None,
    filter_column: Annotated[
        list[str] | None,
        typer.Option("--filter-column", help="A column that searches may filter by; may be repeated."),
    ] = None,
    replicas: Annotated[
        int | None, typer.Option("--replicas", min=1, help="Processes, by Ray Serve. Default: this process alone.")
    ] = None,
    autoscale: Annotated[
        str | None, typer.Option("--autoscale", help="MIN:MAX replicas, by Ray Serve, as the load needs.")
    ] = None,
    text_encoder: TextEncoder = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Answer embeddings in OpenAI's form, and search, until Ctrl-C. What is being answered then is finished."""
    console = Console(stderr=True)
    with report_errors("The server has ended."):
        check_packages()
        from nev.serve.replicas import parse_scale
        from nev.serve.server import bind, describe_address, is_loopback, local_names, read_token, run_server
        from nev.serve.settings import Settings

        scale = parse_scale(replicas, autoscale)
        settings = Settings(
            name=name,
            max_body_bytes=max_body * MIB,
            max_bytes_in_flight=max(max_body, 512) * MIB,
            max_items=max_items,
            max_characters=max_characters,
            max_waiting=max_waiting,
            max_texts=max_texts,
            max_pictures=max_pictures,
            allow_urls=allow_urls,
            filter_columns=frozenset(filter_column or ()),
            token=(token := read_token(token_file)),
            hosts=local_names(host, allow_host or []) if token is None and is_loopback(host) else None,
        )
        if settings.token is None and not is_loopback(host):
            console.print(
                f"[bold yellow]warning:[/] whoever reaches {host} may use this server, and see the index: there is no token. Set "
                "NEV_TOKEN or --token-file, or leave out --host",
                highlight=False,
                soft_wrap=True,
            )
        taken = bind(host, port)
        address = describe_address(host, taken.getsockname()[1])
        open_app = partial(
            make,
            model=model,
            index=index,
            table=table,
            settings=settings,
            precision=precision,
            device=device,
            threads=threads or (1 if scale else None),  # of a replica as many as Ray gives it
            text=text_encoder,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )

        def announce() -> None:
            print(f"nev serves {name or model} at {address}", flush=True)

        if scale is None:
            run_server(open_app(), taken, announce)
            return
        from nev.serve.replicas import start_replicas, stop_replicas

        taken.close()  # it was free: Ray's proxy takes it
        ended = threading.Event()
        signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
        port = int(address.rpartition(":")[2])
        gpus = 1.0 if device and device.startswith("cuda") else 0.0
        try:
            start_replicas(open_app, scale, host, port, max_waiting, float(threads or 1), gpus)
            announce()
            ended.wait()
        finally:
            stop_replicas()


def check_packages() -> None:
    """Raise ModelError where the extra `serve` is not installed."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ModelError(f"nev serve needs more packages: pip install 'nev[serve]' ({error})") from error


def make(
    *,
    model: str,
    index: str | None,
    table: str,
    settings: Settings,
    precision: str,
    device: str | None,
    threads: int | None,
    text: str | None,
    revision: str | None,
    trust_remote_code: bool,
) -> FastAPI:
    """Open the model and the index, and make the application: here, or in each replica. Arguments: as the command's options."""
    from nev.search.index import open_index
    from nev.serve.app import make_app
    from nev.serve.open_engine import open_engine

    searched = open_index(index, table) if index else None  # first, since it takes no time
    engine = open_engine(
        model,
        precision=precision,
        device=device,
        threads=threads,
        text=text,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    return make_app(engine, searched, settings)

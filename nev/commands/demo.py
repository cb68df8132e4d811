"""Search pictures in a browser, from one command: the quickstart's, or those of a folder.

The quickstart's pictures, drawn and learnt first where they are not there yet:

nev demo

Photographs with captions (tars of img2dataset, parquet, or a folder with a table): a head behind a locked photo trunk is trained
on the pairs first.

nev demo flickr8k/dev

Pictures without captions need a trained model:

nev demo photos --model runs/flickr8k-photos
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from nev.common.cli import report_errors
from nev.common.location import S3, absolute_location
from nev.config.base import ConfigError

if TYPE_CHECKING:
    from nev.demo.searchable import Searchable

EXAMPLE = "--model runs/flickr8k-photos photos"


def main(
    folder: Annotated[
        str | None, typer.Argument(help="Your pictures: a folder. Default: those that the quickstart draws.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="A trained model, as nev.load opens it. Default: one is trained first."),
    ] = None,
    source: Annotated[
        str | None, typer.Option("--source", help="Format of the folder (nev prepare --help). Default: by its files.")
    ] = None,
    output: Annotated[
        str, typer.Option("--output", help="Folder of what is made: shards, run, vectors and index.")
    ] = "demo",
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option("--port", min=0, max=65535, help="Port to listen at. Default: 8000, or a free one."),
    ] = None,
) -> None:
    """Show a page that searches pictures by words and by pictures, until Ctrl-C. What is made is reused the next time."""
    console = Console()
    with report_errors("The same command continues."):
        from nev.commands.serve import check_packages
        from nev.demo.page import bind_demo, serve

        check_packages()
        for place in filter(None, (folder, output)):
            if absolute_location(place).startswith(S3):
                raise ConfigError(
                    f"{place}: a demo is of a folder on this machine. For S3: nev embed-images, nev index and nev serve"
                )
        taken = bind_demo(host, port)
        if folder is None and (model or source):
            raise ConfigError("--model and --source are for a folder of pictures: nev demo FOLDER --model MODEL")
        ready = quickstart(output, console) if folder is None else own_pictures(folder, model, source, output, console)
        console.print(f"{ready.images:,} pictures and {ready.texts:,} texts to search", highlight=False)
        serve(ready, taken, host)


def quickstart(output: str, console: Console) -> Searchable:
    """The quickstart's pictures that its model has not seen, searched with that model. Trains the model where there is none."""
    from nev.config.file import load
    from nev.config.paths import with_absolute_paths
    from nev.demo.quickstart import train_quickstart
    from nev.demo.searchable import make_searchable, open_folder, open_pictures
    from nev.runs.manifest import list_steps

    config = with_absolute_paths(load("quickstart"))
    run = Path(config.output, config.name)
    if not list_steps(str(run)):
        train_quickstart(config, console)
    pictures = str(config.data.val)
    _, rows = open_pictures(pictures, "hf-parquet", console)
    work = Path(output).expanduser().resolve() / config.name
    open_folder(work, pictures)
    return make_searchable(str(run), rows, [pictures], work, console)


def own_pictures(folder: str, model: str | None, kind: str | None, output: str, console: Console) -> Searchable:
    """The pictures of a folder, searched with a model; without one, a head is trained on the pictures' captions."""
    from nev.cluster.session import connect
    from nev.demo.own_pictures import train_on
    from nev.demo.searchable import make_searchable, open_folder, open_pictures
    from nev.runs.manifest import list_steps

    pictures = Path(folder).expanduser().resolve()
    name = pictures.name
    work = Path(output).expanduser().resolve() / name
    if not pictures.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    if work.is_relative_to(pictures) or pictures.is_relative_to(work):
        raise ConfigError(f"--output {output} lies in {folder}: what is made there would be taken for pictures")
    kind, rows = open_pictures(str(pictures), kind, console)
    if model is None:
        if kind == "folder":
            raise ConfigError(
                f"{folder} has pictures without captions, so no model can be trained on them: name one by --model. Captions are "
                "read from a table beside the pictures (csv, tsv or jsonl with file_name and caption), from tars and from parquet"
            )
        open_folder(work, str(pictures))
        run = work / "runs" / name
        if not list_steps(str(run)):
            connect()
            train_on(rows, name, work, console)
        model = str(run)
    open_folder(work, str(pictures))
    return make_searchable(model, rows, [str(pictures)], work, console)

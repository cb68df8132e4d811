"""Turn a source into shards: parquet files of (uid, image, caption), in an order that is random over the whole set.

CIFAR-10, whose captions are made of the class names (a split a command, classes.txt beside the splits):

    python pipelines/prepare.py --source hf-parquet --input "../shared/data/cifar10/train-*.parquet" \\
        --label label --name label_name --output data/cifar10/train \\
        --template "a photo of a {}." --template "a blurry photo of a {}." --template "a close-up photo of a {}." \\
        --template "a low resolution photo of a {}." --template "a small picture of a {}."

    python pipelines/prepare.py --source hf-parquet --input "../shared/data/cifar10/test-*.parquet" \\
        --label label --name label_name --output data/cifar10/val --template "a photo of a {}."

Flickr8k, with its five human captions a picture:

    python pipelines/prepare.py --source webdataset --input ../shared/data/flickr8k/train --output data/flickr8k/train
    python pipelines/prepare.py --source webdataset --input ../shared/data/flickr8k/dev --output data/flickr8k/val

The synthetic set, both splits at once:

    python pipelines/prepare.py --source synthetic --train 8000 --val 1000 --output data/synthetic
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from nev.cli import command, explained
from nev.config import ConfigError, parse
from nev.data.prepare import Report, prepare
from nev.data.sources import READERS, SourceOptions
from nev.data.synthetic import write_synthetic

EXAMPLE = "python pipelines/prepare.py --source webdataset --input tars/train --output data/flickr8k/train"
Source = Literal["webdataset", "hf-parquet", "datacomp", "folder-captions", "folder-classes", "synthetic"]
OnRows = Callable[[int], None]


def main(
    source: Annotated[Source, typer.Option(help="The format of the input.")],
    output: Annotated[Path, typer.Option(help="Folder of the split; for synthetic, the folder of both splits.")],
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="File, folder or quoted pattern; may be repeated.")
    ] = None,
    uid: Annotated[str | None, typer.Option(help="uid column, if it has an unusual name.")] = None,
    image: Annotated[str | None, typer.Option(help="Image column, if it has an unusual name.")] = None,
    caption: Annotated[str | None, typer.Option(help="Caption column, if it has an unusual name.")] = None,
    label: Annotated[str | None, typer.Option(help="Integer label column, if it has an unusual name.")] = None,
    name: Annotated[str | None, typer.Option(help="Class name column, if it has an unusual name.")] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="Caption with '{}' for the class name; may be repeated.")
    ] = None,
    train: Annotated[int | None, typer.Option(min=1, help="synthetic: pictures to train on  [8000]")] = None,
    val: Annotated[int | None, typer.Option(min=1, help="synthetic: pictures to evaluate on  [1000]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws the order of the rows, and the synthetic pictures.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Take only the first rows of the input.")] = None,
    rows_per_shard: Annotated[int, typer.Option(min=1, help="A multiple of --row-group-rows.")] = 8192,
    row_group_rows: Annotated[int, typer.Option(min=1, help="Rows that are read together.")] = 256,
    processes: Annotated[int, typer.Option(min=1, help="synthetic: processes that draw.")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the shards in --output.")] = False,
) -> None:
    """Turn a source into shards, in an order that is random over the whole set, and report what was left out."""
    console = Console(stderr=True)
    with explained(console):
        _one_kind(source, inputs, limit, (uid, image, caption, label, name, template), train, val)
        with _progress(console) as (on_read, on_write):
            if source == "synthetic":
                reports = write_synthetic(
                    output,
                    train=train or 8000,
                    val=val or 1000,
                    seed=seed,
                    processes=processes,
                    rows_per_shard=rows_per_shard,
                    row_group_rows=row_group_rows,
                    overwrite=overwrite,
                    on_read=on_read,
                    on_write=on_write,
                )
            else:
                columns = {"uid": uid, "image": image, "caption": caption, "label": label}
                settings = {"columns": columns, "label_name": name, "templates": template or ()}
                options = parse(SourceOptions, settings, where="options")
                report = prepare(
                    READERS[source](inputs or [], options),
                    output,
                    seed=seed,
                    limit=limit,
                    limits=options.limits,
                    rows_per_shard=rows_per_shard,
                    row_group_rows=row_group_rows,
                    overwrite=overwrite,
                    on_read=on_read,
                    on_write=on_write,
                )
                reports = {output.name: report}
    Console().print(_table(reports))
    for report in reports.values():
        typer.echo(f"shards: {report.shards[0].parent}")
    if report.classes:
        typer.echo(f"classes: {report.classes}")


def _one_kind(
    source: str,
    inputs: list[str] | None,
    limit: int | None,
    columns: tuple[object, ...],
    train: int | None,
    val: int | None,
) -> None:
    """Raise ConfigError for options that the source has no use for."""
    if source == "synthetic" and (inputs or limit or any(columns)):
        raise ConfigError("--source synthetic draws its own pictures: it takes no input, columns, templates or limit")
    if source != "synthetic" and (train or val):
        raise ConfigError("--train and --val are for --source synthetic; --limit takes the first rows of an input")
    if source == "webdataset" and any(columns):
        raise ConfigError("--source webdataset has fixed member names: it takes no column names or templates")


@contextmanager
def _progress(console: Console) -> Iterator[tuple[OnRows, OnRows]]:
    """Two counters of rows on the terminal: read and written."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description} {task.completed:>10,.0f} rows"),
        TimeElapsedColumn(),
        console=console,
    )
    with bar:
        read, written = bar.add_task("read   ", total=None), bar.add_task("written", total=None)
        yield lambda rows: bar.advance(read, rows), lambda rows: bar.advance(written, rows)


def _table(reports: dict[str, Report]) -> Table:
    table = Table(title="prepare")
    table.add_column("")
    for split in reports:
        table.add_column(split, justify="right")
    reasons = sorted({reason for report in reports.values() for reason in report.dropped})
    rows: list[tuple[str, Callable[[Report], str]]] = [
        ("rows in", lambda report: f"{report.rows_in:,}"),
        ("kept", lambda report: f"{report.kept:,}"),
        *((f"dropped: {why}", lambda report, why=why: f"{report.dropped.get(why, 0):,}") for why in reasons),
        ("bytes", lambda report: f"{report.bytes:,}"),
        ("shards", lambda report: f"{len(report.shards):,}"),
        ("seconds", lambda report: f"{report.seconds:.1f}"),
    ]
    for title, cell in rows:
        table.add_row(title, *(cell(report) for report in reports.values()))
    return table


app = command(main, EXAMPLE)

if __name__ == "__main__":
    app()

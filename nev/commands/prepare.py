"""Turn a source into shards: parquet files of (uid, image, caption), in an order that is random over the whole set.

CIFAR-10, with captions from the class names (one command for each split; classes.txt lies beside the splits):

    nev prepare --source hf-parquet --input "../shared/data/cifar10/train-*.parquet" \\
        --label label --name label_name --output data/cifar10/train \\
        --template "a photo of a {}." --template "a blurry photo of a {}." --template "a close-up photo of a {}." \\
        --template "a low resolution photo of a {}." --template "a small picture of a {}."

    nev prepare --source hf-parquet --input "../shared/data/cifar10/test-*.parquet" \\
        --label label --name label_name --output data/cifar10/val --template "a photo of a {}."

Flickr8k, with five human captions for each picture:

    nev prepare --source webdataset --input ../shared/data/flickr8k/train --output data/flickr8k/train
    nev prepare --source webdataset --input ../shared/data/flickr8k/dev --output data/flickr8k/val

DataComp as its downloader writes it, filtered by a DFN and shrunk to 256 pixels:

    nev prepare --source datacomp --input shards --metadata metadata --uids dfn.npy --resize 256 \\
        --output data/datacomp/train

From S3 to S3, on the cluster of RAY_ADDRESS, else on all cores here. After an interruption the same command continues:

    nev prepare --source webdataset --input s3://bucket/tars --output s3://bucket/shards/train

The synthetic set, both splits at once:

    nev prepare --source synthetic --train 8000 --val 1000 --output data/synthetic
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nev.common.cli import given_options, report_errors
from nev.common.progress import progress
from nev.config.base import ConfigError
from nev.config.file import parse

if TYPE_CHECKING:
    from nev.data.prepare.pipeline import PrepareReport, Progress, Run
    from nev.data.sources import Source

EXAMPLE = "--source webdataset --input tars/train --output data/flickr8k/train"
Kind = Literal["webdataset", "hf-parquet", "datacomp", "folder-captions", "folder-classes", "synthetic"]
Format = Literal["keep", "jpeg", "webp"]
Column = partial(typer.Option, rich_help_panel="Columns and captions")
Filter = partial(typer.Option, rich_help_panel="Filters")
Picture = partial(typer.Option, rich_help_panel="Smaller pictures")
Drawing = partial(typer.Option, rich_help_panel="The synthetic set")
SHOWN = 10  # suffixes of files that were not read
COMMON = {"--source", "--output", "--seed", "--rows-per-shard", "--row-group-rows", "--overwrite"}
ENCODING = {"--format", "--quality"}
WRITES_PICTURES = {"--seed", "--rows-per-shard", "--limit", "--resize", "--dedupe"}  # without use for tars in place
FILTERS = {"--uids", "--min-side", "--max-aspect", "--min-caption", "--max-caption", "--dedupe"}
SCORE = {"--score", "--min-score"}
FOREIGN = {"--input", "--limit", "--resize"} | ENCODING | FILTERS
# The options of each source beside COMMON. Any other option would have no effect, so it is an error.
TAKES: dict[str, set[str]] = {
    "webdataset": FOREIGN | SCORE | {"--tar-in-uid", "--caption", "--in-place"},
    "hf-parquet": FOREIGN | SCORE | {"--uid", "--image", "--caption", "--label", "--name", "--template"},
    "datacomp": FOREIGN | SCORE | {"--metadata", "--uid", "--caption"},
    "folder-captions": FOREIGN | {"--image", "--caption"},
    "folder-classes": FOREIGN | {"--template"},
    "synthetic": {"--train", "--val", "--processes"},
}

READS_WHAT_IT_WRITES = ("hf-parquet", "folder-classes")


def main(
    context: typer.Context,
    source: Annotated[Kind, typer.Option(help="The format of the input.")],
    output: Annotated[
        str, typer.Option(help="Folder of the split, here or on s3://; for synthetic, the folder of both splits.")
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help="File, folder or quoted pattern, here or on s3://; may be repeated."),
    ] = None,
    metadata: Annotated[
        list[str] | None, Column(help="datacomp: metadata parquet: a file, folder or pattern; may be repeated.")
    ] = None,
    uid: Annotated[str | None, Column(help="uid column, if it has an unusual name.")] = None,
    image: Annotated[str | None, Column(help="Image (or file name) column, if it has an unusual name.")] = None,
    caption: Annotated[str | None, Column(help="Caption column, if it has an unusual name.")] = None,
    label: Annotated[str | None, Column(help="Integer label column, if it has an unusual name.")] = None,
    name: Annotated[str | None, Column(help="Class name column, if it has an unusual name.")] = None,
    tar_in_uid: Annotated[
        bool, Column("--tar-in-uid", help="webdataset: uids are TAR/KEY, for keys that repeat from tar to tar.")
    ] = False,
    template: Annotated[list[str] | None, Column(help="Caption with '{}' for the class name; may be repeated.")] = None,
    uids: Annotated[Path | None, Filter(help="Keep these: .npy of u8,u8, .parquet with uid, or .txt.")] = None,
    min_side: Annotated[int | None, Filter(help="Least pixels of the shorter side.")] = None,
    max_aspect: Annotated[float | None, Filter(help="Largest ratio of longer to shorter side.")] = None,
    min_caption: Annotated[int | None, Filter(help="Least characters of a caption.")] = None,
    max_caption: Annotated[int | None, Filter(help="Most characters of a caption.")] = None,
    score: Annotated[str | None, Filter(help="Column (or JSON key) with the similarity score.")] = None,
    min_score: Annotated[float | None, Filter(help="Least score.")] = None,
    dedupe: Annotated[bool, Filter("--dedupe", help="Keep one of the rows with the same image bytes.")] = False,
    resize: Annotated[int | None, Picture(help="Shrink pictures to this many pixels on the shorter side.")] = None,
    encoding: Annotated[Format, Picture("--format", help="Format of the pictures that --resize shrinks.")] = "keep",
    quality: Annotated[int, Picture(help="JPEG or WebP quality of these pictures, 1 to 100.")] = 90,
    train: Annotated[int, Drawing(min=1, help="Pictures to train on.")] = 8000,
    val: Annotated[int, Drawing(min=1, help="Pictures to evaluate on.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order of the rows, and of the synthetic pictures.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Take only the first rows of the input.")] = None,
    rows_per_shard: Annotated[int, typer.Option(min=1, help="A multiple of --row-group-rows.")] = 8192,
    row_group_rows: Annotated[int, typer.Option(min=1, help="Rows that are read together.")] = 256,
    processes: Annotated[int, Drawing(min=1, help="Processes that draw.")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the shards in --output.")] = False,
    in_place: Annotated[
        bool,
        typer.Option("--in-place", help="webdataset: copy nothing; write an index of the tars, and train on them."),
    ] = False,
) -> None:
    """Turn pictures and captions into shards, in an order that is random over the whole set. Left-out rows are counted."""
    from nev.data.prepare.filters import Filters
    from nev.data.prepare.in_place import SHARED_UIDS, index_tars
    from nev.data.prepare.order import DUPLICATE_UID
    from nev.data.prepare.pipeline import prepare
    from nev.data.prepare.resize import Resize
    from nev.data.prepare.shards import Layout
    from nev.data.prepare.synthetic import write_synthetic
    from nev.data.sources import SOURCES, SourceOptions, find_files, refuse_inside
    from nev.data.sources.webdataset import SUFFIXES

    console = Console(stderr=True)
    # The synthetic set is drawn in seconds, and is not resumed.
    remedy = "with --overwrite starts again" if source == "synthetic" else "continues from the finished parts"
    with report_errors(f"The same command {remedy}."):
        _check_options(source, given_options(context))
        layout = Layout(rows_per_shard, row_group_rows, overwrite)
        filters = parse(
            Filters,
            {
                **{"uids": uids, "min_side": min_side, "max_aspect": max_aspect, "min_caption": min_caption},
                **{"max_caption": max_caption, "score": score, "min_score": min_score, "unique": dedupe},
            },
            where="filters",
        )
        shrink = {"side": resize, "format": encoding, "quality": quality}
        smaller = None if resize is None else parse(Resize, shrink, where="resize")
        unread: Mapping[str, int] = {}
        with _progress(console) as callbacks:
            if source == "synthetic":
                reports = write_synthetic(
                    output,
                    train=train,
                    val=val,
                    seed=seed,
                    processes=processes,
                    layout=layout,
                    progress=callbacks,
                )
            else:
                columns = {"uid": uid, "image": image, "caption": caption, "label": label}
                settings: dict[str, object] = {
                    "columns": columns,
                    "label_name": name,
                    "templates": template or (),
                    "score": score,
                }
                settings |= {"metadata": metadata or (), "tar_in_uid": tar_in_uid}
                options = parse(SourceOptions, settings, where="options")
                refuse_inside(output, [*(inputs or []) * (source in READS_WHAT_IT_WRITES), *options.metadata])
                rows = SOURCES[source](inputs or [], options)
                unread = rows.unread
                run = _run(rows, limit, options.part_bytes)
                if in_place:
                    unread = leave_out_indexes(unread, output, inputs or [])
                    report = index_tars(
                        find_files(inputs or [], SUFFIXES),
                        output,
                        options,
                        filters=filters,
                        row_group_rows=row_group_rows,
                        overwrite=overwrite,
                        run=run,
                        progress=callbacks,
                    )
                else:
                    report = prepare(
                        rows,
                        output,
                        seed=seed,
                        limit=limit,
                        limits=options.limits,
                        filters=filters,
                        resize=smaller,
                        layout=layout,
                        run=run,
                        progress=callbacks,
                    )
                reports = {output.rstrip("/").rpartition("/")[2]: report}
    Console().print(_table(reports, unread))
    last = list(reports.values())[-1]  # the synthetic set has two splits, with one classes.txt
    for report in reports.values():
        typer.echo(f"shards: {report.shards[0].rpartition('/')[0]}")
        typer.echo(f"samples: {report.samples}")
    if last.classes:
        typer.echo(f"classes: {last.classes}")
    if last.counts.get(SHARED_UIDS) and not tar_in_uid:
        console.print(
            f"[yellow]{last.counts[SHARED_UIDS]:,} rows have the uid of a row of another tar. If keys repeat from tar to tar for "
            "different pictures, use --tar-in-uid --overwrite.[/]",
            highlight=False,
        )
    duplicates = last.dropped.get(DUPLICATE_UID, 0)
    if duplicates and source == "webdataset" and not (tar_in_uid or in_place):
        console.print(
            f"[yellow]{duplicates:,} rows have the uid of another row; only the first row of each uid is kept. If keys repeat "
            "from tar to tar for different pictures, use --tar-in-uid --overwrite.[/]",
            highlight=False,
        )


def _check_options(source: str, given: set[str]) -> None:
    """Raise ConfigError for options that have no effect with this source, or with the other options."""
    if unfit := sorted(given - COMMON - TAKES[source]):
        takes = ", ".join(sorted(TAKES[source]))
        raise ConfigError(f"--source {source} has no use for {', '.join(unfit)}. Its options: {takes}")
    if (alone := sorted(given & ENCODING)) and "--resize" not in given:
        raise ConfigError(
            f"{' and '.join(alone)}: only pictures that --resize shrinks are encoded again; give --resize too"
        )
    if "--in-place" in given and (copying := sorted(given & WRITES_PICTURES)):
        raise ConfigError(
            f"{' and '.join(copying)}: --in-place writes no pictures, and keeps the order of the tars; leave it out"
        )


def _run(source: Source, limit: int | None, part_bytes: int) -> Run:
    """The function that runs the tasks: on Ray, or in this process where there is little work."""
    from nev.data.prepare.pipeline import run_here

    if limit is not None or (len(source.parts) == 1 and source.nbytes <= part_bytes):
        return run_here
    from nev.cluster.session import connect
    from nev.cluster.tasks import ray_run

    connect()
    return ray_run


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    """Show two lines: parts of the input that were read, and shards that were written."""
    from nev.data.prepare.pipeline import Progress

    with progress(console) as show:
        yield Progress(
            lambda done, total, rows: show("parts read    ", done, total, f"{rows:,} rows"),
            lambda done, total, rows: show("shards written", done, total, f"{rows:,} rows"),
            lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True),
        )


def leave_out_indexes(unread: Mapping[str, int], output: str, inputs: list[str]) -> dict[str, int]:
    """The files that were not read, by suffix, without the indexes in `output` where that lies in the input."""
    from nev.common.location import absolute_location
    from nev.storage.files import list_files

    inside = any(absolute_location(output).startswith(f"{absolute_location(name)}/") for name in inputs)
    indexes = sum(name.endswith(".parquet") for name in list_files(output)) if inside else 0
    counts = {**unread, ".parquet": unread.get(".parquet", 0) - indexes}
    return {suffix: count for suffix, count in counts.items() if count > 0}


def list_unread(unread: Mapping[str, int]) -> list[tuple[str, int]]:
    """The most frequent suffixes of files that were not read, and the sum of the rest."""
    frequent = Counter(unread).most_common(SHOWN)
    rest = sum(unread.values()) - sum(count for _, count in frequent)
    return frequent + [("others", rest)] * bool(rest)


def _table(reports: dict[str, PrepareReport], unread: Mapping[str, int]) -> Table:
    """The report. unread: files beside the input that the source does not read, by suffix."""
    table, last = Table(title="prepare"), next(iter(reports.values()))
    table.add_column("")
    for split in reports:
        table.add_column(split, justify="right")
    reasons = sorted({reason for report in reports.values() for reason in report.dropped})
    rows: list[tuple[str, Callable[[PrepareReport], str]]] = [
        ("rows in", lambda report: f"{report.rows_in:,}"),
        ("kept", lambda report: f"{report.rows_written:,}"),
        *((f"dropped: {why}", lambda report, why=why: f"{report.dropped.get(why, 0):,}") for why in reasons),
        *((f"files not read: {name}", lambda _, count=count: f"{count:,}") for name, count in list_unread(unread)),
        ("bytes", lambda report: f"{report.bytes:,}"),
        ("shards", lambda report: f"{len(report.shards):,}"),
        *((name, lambda report, name=name: f"{report.counts[name]:,}") for name in last.counts),
        ("seconds", lambda report: f"{report.seconds:.1f}"),
    ]
    for title, cell in rows:
        table.add_row(escape(title), *(cell(report) for report in reports.values()))
    return table

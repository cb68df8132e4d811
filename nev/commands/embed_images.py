"""Run a vision encoder over pictures, once.

The pictures of folders, tars or parquet shards, here or on S3, as vectors of a trained model, one file a part of the input:

nev embed-images --model runs/quickstart --input photos --output vectors

A locked trunk over the shards of its experiment, as sidecars beside the shards. Training then opens no picture:

nev embed-images --config flickr8k_photos

On a cluster whose GPU nodes start on demand, add --gpus 8.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from nev.common.cli import Gpus, Overrides, Revision, TextEncoder, TrustRemoteCode, given_options, report_errors
from nev.common.location import absolute_location
from nev.common.words import counted
from nev.config.base import ConfigError
from nev.config.file import parse

if TYPE_CHECKING:
    from collections import Counter

    from nev.embed.corpus import CorpusOptions, CorpusReport

EXAMPLE = "--model runs/quickstart --input photos --output vectors"
SHOWN = 5  # reasons of bad pictures
Kind = Literal["webdataset", "hf-parquet", "datacomp", "folder-captions", "folder"]
Precision = Literal["float32", "float16", "int8", "binary"]
Corpus = partial(typer.Option, rich_help_panel="With --model: vectors of any pictures")
Column = partial(typer.Option, rich_help_panel="With --model: columns and captions")
CONFIG_OPTIONS = {"--config", "--set"}
BOTH = {"--gpus"}
# The options of a source that other sources do not have.
TAKES: dict[str, set[str]] = {
    "webdataset": {"--tar-in-uid", "--caption"},
    "hf-parquet": {"--uid", "--image", "--caption"},
    "datacomp": {"--metadata", "--uid", "--caption"},
    "folder-captions": {"--image", "--caption"},
    "folder": set(),
}


def main(
    context: typer.Context,
    config: Annotated[
        str | None,
        typer.Option("--config", help="Experiment with a locked trunk: a file (YAML), or the name of a shipped one."),
    ] = None,
    overrides: Overrides = None,
    gpus: Gpus = None,
    model: Annotated[
        str | None,
        Corpus(
            "--model",
            help="A run (its best checkpoint), a checkpoint, an exported folder or released weights: a folder, "
            "s3://..., or a name on the hub.",
        ),
    ] = None,
    inputs: Annotated[
        list[str] | None, Corpus("--input", help="File, folder or quoted pattern, here or on s3://; may be repeated.")
    ] = None,
    output: Annotated[str | None, Corpus("--output", help="Folder of the vector files, here or on s3://.")] = None,
    source: Annotated[Kind | None, Corpus("--source", help="The format of the input. Default: by its files.")] = None,
    width: Annotated[int | None, Corpus("--width", min=1, help="The first numbers of a vector (Matryoshka).")] = None,
    precision: Annotated[Precision, Corpus("--precision", help="How the numbers are stored.")] = "float32",
    thumbnails: Annotated[
        int, Corpus("--thumbnails", min=0, help="Longest side of a JPEG beside each vector, in pixels; 0: none.")
    ] = 0,
    batch_size: Annotated[
        int | None,
        Corpus("--batch-size", min=1, help="Pictures of a forward. Default: on a CPU 16 of 224 pixels, on a GPU 256."),
    ] = None,
    limit: Annotated[int | None, Corpus("--limit", min=1, help="Take only the first rows of the input.")] = None,
    prune: Annotated[
        bool, Corpus("--prune", help="Delete the vector files of input that has changed or is gone.")
    ] = False,
    metadata: Annotated[
        list[str] | None, Column("--metadata", help="DataComp's metadata parquet, to which its tars are joined.")
    ] = None,
    uid: Annotated[str | None, Column("--uid", help="uid column, if it has an unusual name.")] = None,
    image: Annotated[
        str | None, Column("--image", help="Image (or file name) column, if it has an unusual name.")
    ] = None,
    caption: Annotated[
        str | None,
        Column("--caption", help="Caption column, if it has an unusual name. Of tars: a key of the JSON, or txt."),
    ] = None,
    tar_in_uid: Annotated[
        bool, Column("--tar-in-uid", help="Tars: uids are TAR/KEY, for keys that repeat from tar to tar.")
    ] = False,
    captions: Annotated[
        bool,
        Column("--captions/--no-captions", help="Write captions, and the cosine of each picture with its best one."),
    ] = True,
    text_encoder: TextEncoder = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Run a model over any pictures (--model), or a locked trunk over its experiment's (--config). Finished parts are skipped."""
    console = Console()
    with report_errors("The same command continues with the parts that are left."):
        given = given_options(context)
        check_options(given)
        if config is not None:
            embed_sidecars(config, overrides or [], gpus, console)
            return
        from nev.data.sources import refuse_inside
        from nev.embed.corpus import CorpusOptions

        absolute = [absolute_location(each) for each in inputs or []]
        output = absolute_output(str(output))
        tables = [absolute_location(each) for each in metadata or []]
        refuse_inside(output, [*absolute, *tables])
        kind = choose_kind(source, given, absolute, bool(tables), console)
        columns = {"uid": uid, "image": image, "caption": caption}
        settings: dict[str, object] = {"columns": columns, "metadata": tables, "captioned": False}
        settings["tar_in_uid"] = tar_in_uid
        options = CorpusOptions(
            output=output,
            inputs=absolute,
            width=width,
            precision=precision,
            captions=captions and kind != "folder",
            thumbnail=thumbnails,
            batch_size=batch_size,
            limit=limit,
            prune=prune,
        )
        failed = embed_vectors(
            (str(model), text_encoder, revision, trust_remote_code), kind, settings, options, gpus, console
        )
    if failed:
        raise typer.Exit(2)


def check_options(given: set[str]) -> None:
    """Raise ConfigError for other options than those of one mode. given: on the command line."""
    if len(given & {"--config", "--model"}) != 1:
        raise ConfigError(
            "give --model for vectors of any pictures, or --config for the sidecars of an experiment's locked trunk"
        )
    mode = "--config" if "--config" in given else "--model"
    fitting = CONFIG_OPTIONS if mode == "--config" else given - CONFIG_OPTIONS
    if unfit := sorted(given - fitting - BOTH):
        raise ConfigError(f"{mode} has no use for {', '.join(unfit)}")
    if mode == "--model" and (absent := sorted({"--input", "--output"} - given)):
        raise ConfigError(f"--model needs {' and '.join(absent)}, too")


def absolute_output(output: str) -> str:
    """The output as an absolute path, or the URL. Raises ConfigError for what is no folder."""
    from nev.config.paths import refuse_lost_output

    refuse_lost_output(output, "--output")
    if output.endswith(".parquet"):
        raise ConfigError(f"--output {output}: many files are written, so give the name of a folder")
    if output.startswith("s3://") and len(output.rstrip("/").split("/")) < 4:
        raise ConfigError(f"--output {output}: give a folder in the bucket: {output.rstrip('/')}/NAME")
    return absolute_location(output)


def choose_kind(kind: str | None, given: set[str], inputs: list[str], metadata: bool, console: Console) -> str:
    """The source that reads the input: `kind`, else by its files. Raises ConfigError for options of other sources."""
    from nev.data.sources.recognise import recognise_source

    if kind is None:
        kind, unread = recognise_source(inputs, metadata)
        others = ", ".join(f"{count:,} {suffix}" for suffix, count in unread.most_common(SHOWN))
        console.print(f"--source {kind}{f'; not read: {others}' if others else ''}", highlight=False, soft_wrap=True)
    if unfit := sorted(given & set().union(*TAKES.values()) - TAKES[kind]):
        raise ConfigError(f"--source {kind} has no use for {', '.join(unfit)}")
    return kind


def embed_vectors(
    place: tuple[str, str | None, str | None, bool],
    kind: str,
    settings: dict[str, object],
    options: CorpusOptions,
    gpus: int | None,
    console: Console,
) -> bool:
    """Write vector files, and print what was done. Returns whether parts could not be read.

    place: arguments of `nev.load`. settings: of the source. gpus: to use; None: those that are up.
    """
    from nev.data.sources import SOURCES, SourceOptions
    from nev.embed.corpus import PART_BYTES, choose_run, embed_corpus, weight_bytes
    from nev.embed.same_model import open_model

    model, same_model = open_model(*place, with_text=options.captions)
    settings |= {"limits": model.spec.limits, "part_bytes": PART_BYTES}
    source = SOURCES[kind](options.inputs, parse(SourceOptions, settings, where="options"))
    run = choose_run(source, gpus, weight_bytes(model, options.captions), console)
    report = embed_corpus(model, same_model, source, options, console, run)
    show_report(report, options.output, console)
    return bool(report.unreadable)


def show_report(report: CorpusReport, output: str, console: Console) -> None:
    """Print what was done, and what was not."""
    from nev.data.prepare.order import DUPLICATE_UID

    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    if report.pruned:
        line(f"{counted(report.pruned, 'vector file')} of other input deleted")
    rate = f", {report.pictures / report.seconds:,.0f} pictures/s" if report.pictures > report.seconds else ""
    written, pictures = counted(report.written, "vector file"), counted(report.pictures, "picture")
    line(f"{written} written, {pictures}{rate}; {report.skipped:,} were there")
    unusable = counted(report.bad.total(), "picture")
    bad = f", {unusable} cannot be used (listed in {output}/_bad)" if report.bad else ""
    line(f"{output}: {counted(report.total, 'vector')}{bad}")
    show_bad(report.bad, console)
    if repeated := report.repeated + report.bad.get(DUPLICATE_UID, 0):
        line(
            f"{counted(repeated, 'picture')} with the uid of another picture, and an index has one row a uid. If keys repeat "
            "from tar to tar for different pictures, use --tar-in-uid, and another --output."
        )
    if report.unreadable:
        line(
            f"{counted(len(report.unreadable), 'part')} could not be read. The same command tries them again. The first:"
        )
        line(f"  {report.unreadable[0]}")


def embed_sidecars(config: str, overrides: list[str], gpus: int | None, console: Console) -> None:
    """Write the sidecars of an experiment's locked trunk, and print what was done."""
    from nev.config.file import load
    from nev.config.paths import with_absolute_paths

    experiment = with_absolute_paths(load(config, overrides))
    experiment.refuse_trained_trunk()
    from nev.cluster.session import connect
    from nev.embed.features import embed_features

    connect()
    report = embed_features(experiment, console, gpus)
    rate = f", {report.views / report.seconds:,.0f} pictures/s" if report.seconds else ""
    bad = f", {report.bad.total():,} cannot be used" if report.bad else ""
    written, pictures = counted(report.shards, "sidecar"), counted(report.pictures, "picture")
    console.print(f"{written} written, {pictures}{bad}{rate}", highlight=False)
    show_bad(report.bad, console)


def show_bad(bad: Counter[str], console: Console) -> None:
    """Print the most frequent reasons why pictures cannot be used."""
    for reason, count in bad.most_common(SHOWN):
        console.print(f"  {count:,} x {reason}", highlight=False, markup=False, soft_wrap=True)

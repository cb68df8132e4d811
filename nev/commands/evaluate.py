"""Score a checkpoint: on its experiment's validation set, on another set by --set data.val=..., or on a suite of tasks.

Both end with a page of tables and pictures, NAME.html, and the numbers as JSON.

nev evaluate --checkpoint runs/cifar10/checkpoints/step-00001170
nev evaluate --checkpoint runs/cifar10/checkpoints/step-00001170 --set data.val=data/other/val
nev evaluate --checkpoint s3://BUCKET/runs/cifar10/checkpoints/step-00001170

A suite is a list of tasks, as YAML: quick, imagenet, flickr30k, coco, datacomp (38 tasks), ood, or a file of your own.

NEV_DATA=../shared/data nev evaluate --checkpoint runs/flickr8k/checkpoints/step-00000500 --suite quick
nev evaluate --checkpoint runs/big/checkpoints/step-00070830 --suite datacomp --data /data/datacomp

Tasks of mteb, whose data comes from the hub:

nev evaluate --checkpoint runs/big/checkpoints/step-00070830 --mteb STSBenchmark.v2 --mteb Flickr30kI2TRetrieval
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated

import typer
from rich.console import Console

from nev.common.cli import Overrides, report_errors

EXAMPLE = "--checkpoint runs/cifar10/checkpoints/step-00001170 --suite quick --data DATA"


def main(
    checkpoint: Annotated[str, typer.Option(help="Checkpoint: runs/NAME/checkpoints/step-..., or s3://...")],
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
        typer.Option(help="Folder or s3:// prefix for the results (default: evaluation/ in the run's folder)."),
    ] = None,
) -> None:
    """Score a checkpoint on its experiment's validation set, on another one, or on a suite."""
    console = Console()
    with report_errors():
        from nev.config.base import ConfigError

        if suite and mteb:
            raise ConfigError("--suite and --mteb are two evaluations: run one after the other")
        if data and not suite:
            raise ConfigError("--data is the folder of a suite's data: give --suite too, or --set data.val=...")
        if against and not suite:
            raise ConfigError("--against is another model's JSON of a suite: give --suite too")
        from nev.eval.evaluate import evaluate_checkpoint, evaluate_mteb
        from nev.eval.evaluate_suite import evaluate_suite
        from nev.eval.report.tables import metrics_table, suite_table

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
    for file in files:
        label = {".html": "report", ".json": "numbers"}.get(PurePosixPath(file).suffix, PurePosixPath(file).stem)
        console.print(f"{label:<11} {file}", highlight=False, soft_wrap=True)

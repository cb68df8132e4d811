"""Embed the captions of an experiment's shards with its locked text encoder, once: sidecars beside the shards.

python pipelines/embed_text.py --config configs/cifar10.yaml

On a cluster that starts its GPU nodes when they are asked for:

python pipelines/embed_text.py --config configs/nomic_embed_vision_v1_5.yaml --gpus 8
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from nev.common.cli import ConfigFile, Overrides, make_command, report_errors
from nev.config.file import load


def main(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="GPUs to ask the cluster for; it may have to start them. Default: those that are up."),
    ] = None,
) -> None:
    """Write the text sidecars of an experiment's shards; shards that have theirs are passed over."""
    console = Console()
    with report_errors(console, "The same command goes on with the shards that are left."):
        experiment = load(config, overrides or [])
        from nev.cluster.session import connect
        from nev.config.paths import with_absolute_paths
        from nev.embed.captions import embed_captions

        experiment = with_absolute_paths(experiment)
        connect()
        roots = [root for root in (experiment.data.train, experiment.data.val) if root]
        done = embed_captions(roots, experiment.data.columns, experiment.text, console, gpus)
    rate = f", {done.captions / done.seconds:,.0f} captions/s" if done.seconds else ""
    console.print(f"{done.shards} sidecars written, {done.captions:,} captions{rate}", highlight=False)


app = make_command(main, "python pipelines/embed_text.py --config configs/cifar10.yaml")

if __name__ == "__main__":
    app()

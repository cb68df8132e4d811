"""Embed the captions of an experiment's shards with its locked text encoder, once: sidecars beside the shards.

nev embed-text --config cifar10

On a cluster whose GPU nodes start on demand:

nev embed-text --config nomic_embed_vision_v1_5 --gpus 8
"""

from __future__ import annotations

from rich.console import Console

from nev.common.cli import ConfigFile, Gpus, Overrides, report_errors

EXAMPLE = "--config cifar10"


def main(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Gpus = None,
) -> None:
    """Embed the captions of an experiment's shards with its text encoder, once. Finished shards are skipped."""
    console = Console()
    with report_errors("The same command continues with the shards that are left."):
        from nev.config.file import load
        from nev.config.paths import with_absolute_paths

        experiment = with_absolute_paths(load(config, overrides or []))
        from nev.cluster.session import connect
        from nev.embed.captions import embed_captions

        connect()
        report = embed_captions(experiment.data.sets, experiment.text, console, gpus)
    rate = f", {report.captions / report.seconds:,.0f} captions/s" if report.seconds else ""
    console.print(f"{report.shards} sidecars written, {report.captions:,} captions{rate}", highlight=False)

"""Run an experiment's locked trunk over its pictures, once: sidecars beside the shards. Training then opens no picture.

nev embed-images --config flickr8k_photos

On a cluster whose GPU nodes start on demand:

nev embed-images --config eyes_in_minutes --gpus 8
"""

from __future__ import annotations

from rich.console import Console

from nev.common.cli import ConfigFile, Gpus, Overrides, report_errors

EXAMPLE = "--config flickr8k_photos"
SHOWN = 5  # reasons of bad pictures


def main(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Gpus = None,
) -> None:
    """Run an experiment's locked trunk over its pictures, once. Finished shards are skipped."""
    console = Console()
    with report_errors("The same command continues with the shards that are left."):
        from nev.config.file import load
        from nev.config.paths import with_absolute_paths

        experiment = with_absolute_paths(load(config, overrides or []))
        experiment.refuse_trained_trunk()
        from nev.cluster.session import connect
        from nev.embed.features import embed_features

        connect()
        report = embed_features(experiment, console, gpus)
    rate = f", {report.views / report.seconds:,.0f} pictures/s" if report.seconds else ""
    bad = f", {report.bad.total():,} cannot be used" if report.bad else ""
    console.print(f"{report.shards} sidecars written, {report.pictures:,} pictures{bad}{rate}", highlight=False)
    for reason, count in report.bad.most_common(SHOWN):
        console.print(f"  {count:,} x {reason}", highlight=False, markup=False, soft_wrap=True)

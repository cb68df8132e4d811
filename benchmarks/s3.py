"""Reading shards from S3: requests and bytes of an epoch, and images/s, beside the same shards on the local disk.

make bench NAME=s3
NEV_DATA=../shared/data python benchmarks/s3.py --repetitions 3

The store is a server on this machine that answers after 30 ms, at 80 MB/s a connection. It takes CPU time of the same cores.
"""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import report
from nev.common.cli import make_command, report_errors

BYTES_GOAL, REQUESTS_GOAL = 1.1, 2.0
GROUPS = {"256": (256, 256), "1000": (1000, 250), "10000": (10_000, 250), "1000_uneven": (1000, 256)}  # rows, and R
COUNTED_ROWS = 20_000
NOTES = (
    "The store is a server on the same cores that answers after 30 ms, and sends 80 MB/s on a connection. *_images_per_s: nev's "
    "stream into one consumer, photographs of imagenet_sample at 224 px with text vectors, R = 256. windows: as many row groups "
    "as have 1,024 rows. groups: data.window=0, a row group a task.",
    f"bytes_read_vs_data_N, requests_per_row_group_N: one process reads an epoch of {COUNTED_ROWS:,} rows of Flickr8k and their "
    "text vectors, in row groups of N rows and windows of the default size; R = 256, and 250 for 1,000 and 10,000 rows; uneven: "
    "R = 256 there. Data are the bytes of shards and sidecars. Requests are all of the epoch but listings, footers of the files "
    "included.",
)


def main(
    data: Annotated[Path, typer.Option(help="Folder with imagenet_sample/ and flickr8k/.", envvar="NEV_DATA")] = Path(
        "../shared/data"
    ),
    size: Annotated[int, typer.Option(min=8, help="Side of the pictures, in pixels.")] = 224,
    rows: Annotated[int, typer.Option(min=1024, help="Rows of the set whose rate is measured.")] = 4096,
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds; every contestant runs once in each.")] = 3,
    results: Annotated[
        Path, typer.Option(help="Folder of s3.json.", show_default="benchmarks/results")
    ] = report.RESULTS,
) -> None:
    """Count what an epoch from S3 costs, and measure its images/s beside the local disk; writes benchmarks/results/s3.json."""
    from benchmarks.contestants import pictures, streams
    from benchmarks.contestants.object_store import object_store
    from benchmarks.contestants.processes import in_own_process

    console = Console()
    with report_errors(), tempfile.TemporaryDirectory(prefix="nev-bench-") as name:
        folder = Path(name, "bucket")
        with console.status("writing shards"):
            own = pictures.imagenet_sample(data.absolute(), folder, rows)
            for group in {group for group, _ in GROUPS.values()}:
                pictures.write_groups(data.absolute(), folder / f"groups-{group}", COUNTED_ROWS, group)
        with object_store(Path(name)) as address:
            os.environ |= {
                "AWS_ENDPOINT_URL": address,
                "AWS_ACCESS_KEY_ID": "key",
                "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_DEFAULT_REGION": "us-east-1",
            }
            remote = own._replace(shards=f"s3://{own.shards.removeprefix(f'{name}/')}")
            streamed = {
                "local_images_per_s": (own, None),
                "s3_windows_images_per_s": (remote, None),
                "s3_groups_images_per_s": (remote, 0),
            }
            figures = report.measure_interleaved(
                {
                    figure: partial(in_own_process, streams.nev_rate, of, size, window)
                    for figure, (of, window) in streamed.items()
                },
                repetitions,
                console,
            )
            ratios = {
                "s3_vs_local": report.Ratio("s3_windows_images_per_s", "local_images_per_s"),
                "s3_windows_vs_groups": report.Ratio("s3_windows_images_per_s", "s3_groups_images_per_s"),
            }
            goals: dict[str, report.Goal] = {}
            for kind, (group, block) in GROUPS.items():
                shards = f"groups-{group}"
                counted = in_own_process(
                    streams.count_epoch, f"s3://bucket/{shards}", str(folder / shards), address, block
                )
                figures[f"s3_bytes_read_vs_data_{kind}"] = [counted.bytes_vs_data]
                figures[f"s3_requests_per_row_group_{kind}"] = [counted.requests_a_group]
                goals[f"s3_bytes_read_vs_data_{kind}"] = report.Goal(BYTES_GOAL, at_most=True)
                goals[f"s3_requests_per_row_group_{kind}"] = report.Goal(REQUESTS_GOAL, at_most=True)
        report.write("s3", report.this_command(), figures, ratios, NOTES, results, console, goals=goals)


app = make_command(main, "make bench NAME=s3")

if __name__ == "__main__":
    app()

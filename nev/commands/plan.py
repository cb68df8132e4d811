"""What a run takes on machines that are not there yet: time, cost, decoders, and what bounds it. Nothing is started.

nev plan --config nomic_embed_vision_v1_5 --gpu h100 --gpus 16 --rows 1547277668 --width 768
nev plan --config mine.yaml --gpu l40s --gpus 64 --spot --measured runs/mine --prices prices.yaml --json plan.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from nev.common.cli import ConfigFile, Overrides, report_errors

if TYPE_CHECKING:
    from nev.planner.measured import Measured
    from nev.planner.table import Row

EXAMPLE = "--config nomic_embed_vision_v1_5 --gpu h100 --gpus 16 --rows 1547277668 --width 768"
MACHINES, NUMBERS = "The machines", "Numbers of your own, in the place of those that nev has"


def main(
    config: ConfigFile,
    gpu: Annotated[str, typer.Option(help="Kind of GPU: h100, l40s, ...", rich_help_panel=MACHINES)],
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs, a worker on each.", rich_help_panel=MACHINES)],
    overrides: Overrides = None,
    node: Annotated[
        str | None, typer.Option(help="Type of the GPU nodes. Default: the usual one.", rich_help_panel=MACHINES)
    ] = None,
    spot: Annotated[bool, typer.Option("--spot", help="Spot nodes.", rich_help_panel=MACHINES)] = False,
    decoders: Annotated[
        int | None,
        typer.Option(min=0, help="Most nodes that decode. Default: as many as are needed.", rich_help_panel=MACHINES),
    ] = None,
    measured: Annotated[
        str | None,
        typer.Option(
            help="A run on the same kind of GPU, whose own rates are taken: its folder, OUTPUT/NAME.",
            rich_help_panel=NUMBERS,
        ),
    ] = None,
    tracking: Annotated[
        str | None,
        typer.Option(help="Address of MLflow. --measured is then the id of a run there.", rich_help_panel=NUMBERS),
    ] = None,
    prices: Annotated[
        str | None, typer.Option(help="File of prices, YAML or JSON; docs/scaling.md.", rich_help_panel=NUMBERS)
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Rows of an epoch; of several sets, each set's rows times its epochs. Needed with train.epochs.",
            rich_help_panel=NUMBERS,
        ),
    ] = None,
    picture_kb: Annotated[
        float | None, typer.Option(min=0.1, help="Size of a stored picture, in KB.", rich_help_panel=NUMBERS)
    ] = None,
    decode_rate: Annotated[
        float | None, typer.Option(min=0.1, help="Images a second that a vCPU decodes.", rich_help_panel=NUMBERS)
    ] = None,
    losses: Annotated[
        float | None, typer.Option(min=0, help="Losses of a spot node an hour.", rich_help_panel=NUMBERS)
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(min=1, help="Width of a text vector. Default: by the text encoder's config.json."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the plan to this file, too.")] = None,
) -> None:
    """Predict the time and cost of a training on some GPUs, what bounds it, and how far it scales."""
    console = Console()
    with report_errors():
        from nev.config.file import load
        from nev.planner.cluster import make_cluster
        from nev.planner.forecast import make_forecast
        from nev.planner.hardware import load_prices
        from nev.planner.number import Number, shipped_numbers
        from nev.planner.table import forecast_rows, to_json
        from nev.planner.workload import count_steps, possible_worlds, read_workload, with_workers

        hardware, price_list = load_prices(prices)
        cluster = make_cluster(hardware, gpu, gpus, node, decoders, spot)
        if json_file and not json_file.parent.is_dir():
            from nev.config.base import ConfigError

            raise ConfigError(f"--json {json_file}: there is no folder {json_file.parent}")
        experiment = load(config, [*(overrides or []), *with_workers(gpus)])
        count_steps(experiment, rows)
        run = _read_measured(measured, tracking)
        given = {
            "picture_bytes": (picture_kb and 1000 * picture_kb, "--picture-kb"),
            "decode_images_s": (decode_rate, "--decode-rate"),
            "spot_losses_hour": (losses, "--losses"),
        }
        numbers = {
            **shipped_numbers(),
            **{name: Number(value, "measured", option) for name, (value, option) in given.items() if value is not None},
        }
        from nev.models.text import text_width

        width = width or text_width(experiment.text)
        batch, block = experiment.train.global_batch, experiment.data.block_rows
        worlds = {*possible_worlds(batch, block, cluster.node.gpus), gpus, *([run.world] if run else [])}
        workload = read_workload(experiment, width, rows, sorted(worlds), gpus, numbers["overlap"].value)
        plan = make_forecast(workload, cluster, numbers, price_list, run)
        table = forecast_rows(plan)
        if json_file:
            json_file.write_text(json.dumps(to_json(plan), indent=1) + "\n", encoding="utf-8")
    console.print(
        f"{experiment.name} on {gpus:,} {gpu}; prices of {price_list.date}, {price_list.source}", highlight=False
    )
    console.print(_to_table(table))


def _read_measured(run: str | None, tracking: str | None) -> Measured | None:
    """The numbers of the run that the options name. Raises ConfigError for --tracking alone."""
    from nev.config.base import ConfigError
    from nev.planner.measured import read_mlflow_run, read_run

    if run is None:
        if tracking is not None:
            raise ConfigError("--tracking needs --measured, the id of a run there")
        return None
    return read_mlflow_run(tracking, run) if tracking else read_run(run)


def _to_table(rows: list[Row]) -> Table:
    table = Table(show_header=True, box=None, pad_edge=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("origin")
    table.add_column("note", style="dim")
    for row in rows:
        table.add_row(*row, style="bold" if row.name in ("images a second", "time", "cost", "bound by") else None)
    return table

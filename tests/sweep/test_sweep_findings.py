"""What is said of a sweep: intervals, paired differences, the fit, the figure and the sentences."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.collections import PathCollection
from scipy import stats

from nev.config.base import ConfigError
from nev.config.file import parse
from nev.eval.report.plots import new_figure
from nev.sweep.config import Sweep
from nev.sweep.figures import draw_figure, plot_by_arm, plot_over_numbers
from nev.sweep.findings import describe_findings
from nev.sweep.report import make_subtitle
from nev.sweep.results import Outcome, TrialResult
from nev.sweep.statistics import estimate, fit_parabola
from nev.sweep.trials import Arm

FLOATS = st.floats(0, 1, allow_subnormal=False)


@given(st.lists(FLOATS, min_size=2, max_size=8).filter(lambda values: np.ptp(values) > 1e-6))
def test_the_interval_is_students(values: list[float]) -> None:
    found = estimate(values)
    expected = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.mean == pytest.approx(np.mean(values))


def test_one_seed_says_nothing_of_others() -> None:
    assert estimate([0.3]) == (0.3, -math.inf, math.inf, 1)
    with pytest.raises(ValueError, match="no value"):
        estimate([])


def test_intervals_cover_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    found = [estimate(random.normal(0.4, 0.1, 3).tolist()) for _ in range(2000)]
    assert np.mean([one.low <= 0.4 <= one.high for one in found]) == pytest.approx(0.95, abs=0.015)


def test_the_fit_finds_its_peak() -> None:
    def height(size: int) -> float:
        return 0.5 - 0.02 * (math.log2(size) - 8) ** 2

    values = {float(size): {seed: height(size) for seed in range(2)} for size in (64, 128, 256, 512, 1024)}
    curve = fit_parabola(values)
    assert curve
    assert curve.top
    assert curve.turn == pytest.approx(256)
    assert curve(64) == pytest.approx(height(64))
    assert curve.residual == pytest.approx(0, abs=1e-9)
    assert fit_parabola({size: value for size, value in values.items() if size < 512}) is None, (
        "three points it would connect"
    )
    rising = fit_parabola({size: {0: math.log2(size) / 20} for size in values})
    assert rising
    assert rising.coefficients == pytest.approx((0, 1 / 20, 0), abs=1e-9)
    assert fit_parabola({1.0 + size / 1000: value for size, value in values.items()}) is None, "not worth a logarithm"


def test_a_bend_is_one_as_often_as_chance_has_it() -> None:
    """Of lines that are straight but for noise, one in twenty."""
    random = np.random.default_rng(1)
    found = []
    for _ in range(600):
        line = {float(2**x): dict(enumerate(0.05 * x + random.normal(0, 0.01, 3))) for x in range(6, 14)}
        curve = fit_parabola(line)
        assert curve
        found.append(curve.p < 0.05)
    assert np.mean(found) == pytest.approx(0.05, abs=0.02)


def sweep(axes: object, seeds: tuple[int, ...] = (0, 1, 2)) -> Sweep:
    raw = {"name": "s", "question": "Which?", "base": "b.yaml", "axes": axes, "seeds": seeds, "samples": 1000}
    return parse(Sweep, {**raw, "metrics": ["zero_shot/top1", "space/gap"]})


def outcome(axes: dict[str, object], heights: dict[Arm, float], seeds: tuple[int, ...] = (0, 1, 2)) -> Outcome:
    results = [
        TrialResult(
            name=f"{arm}-{seed}",
            arm=arm,
            seed=seed,
            metrics={"zero_shot/top1": height + 0.002 * seed**2, "space/gap": 0.5},
            samples=1000,
            run_id="r",
            seconds=1,
        )
        for arm, height in heights.items()
        for seed in seeds
    ]
    return Outcome(sweep(axes, seeds), results, {})


def test_sentences_name_what_differs_and_what_does_not() -> None:
    a, b, c = ((("lock", name),) for name in ("text", "none", "image"))
    done = outcome({"lock": ["text", "none", "image"]}, {a: 0.3, b: 0.42, c: 0.3})
    said = describe_findings(done)
    assert "Which?" in said
    assert "| text (reference) | 30.3 % ±" in said
    assert "none against text: +12.0 points" in said
    assert "Equal to text to within 1.0 points: image." in said
    assert "0.500 for every arm: this metric shows no difference at this budget." in said.partition("**space/gap**")[2]
    few = describe_findings(outcome({"lock": ["text", "none"]}, {a: 0.3, b: 0.9}, seeds=(0, 1)))
    assert "no difference is tested" in few
    assert "against text" not in few


def test_a_failed_trial_is_in_no_mean_and_is_told() -> None:
    a, b = ((("lock", name),) for name in ("text", "none"))
    done = outcome({"lock": ["text", "none"]}, {a: 0.3, b: 0.4})
    early = done.results[1].model_copy(update={"ended_early": "asha", "samples": 500})
    failed = Outcome(done.sweep, [early, *done.results[2:]], {done.results[0].name: "it broke"})
    assert set(failed.values("zero_shot/top1")[a]) == {2}
    assert failed.complete_arms == {b}
    said = describe_findings(failed)
    assert "| text (reference) | 30.8 %, 1 of 3 seeds |" in said
    assert "Not compared, since seeds are missing: text." in said
    assert "none against text" not in said
    assert "it broke" in said
    assert "at 500 samples" in said
    assert not failed.all_finished


def test_sizes_are_told_step_by_step() -> None:
    heights = {(("train.global_batch", str(size)),): 0.2 + 0.05 * math.log2(size / 64) for size in (64, 128, 256, 512)}
    said = describe_findings(outcome({"train.global_batch": [64, 128, 256, 512]}, heights))
    assert "From train.global_batch 64 to 128: +5.0 points" in said
    assert "The last step up of train.global_batch that is distinguishable ends at 512." in said
    assert "Over log2 of train.global_batch no curvature is distinguishable" in said
    bent = {arm: 0.5 - 0.02 * (math.log2(int(arm[0][1])) - 8) ** 2 for arm in heights}
    said = describe_findings(outcome({"train.global_batch": [64, 128, 256, 512]}, bent))
    assert "A parabola over log2 of train.global_batch is highest at 256" in said
    few = describe_findings(outcome({"train.global_batch": [64, 128, 256, 512]}, bent, seeds=(0, 1)))
    assert "parabola" not in few
    assert "From train" not in few


def test_samples_are_those_that_were_seen() -> None:
    arms = {(("train.global_batch", str(size)),): 0.2 for size in (64, 128)}
    done = outcome({"train.global_batch": [64, 128]}, arms)
    assert "1,000 samples seen by each" in describe_findings(done)
    larger = [one.model_copy(update={"samples": 1024}) if "128" in one.name else one for one in done.results]
    uneven = Outcome(done.sweep, larger, {})
    assert "1,000 to 1,024 samples seen (whole steps) by each" in describe_findings(uneven)
    assert make_subtitle(uneven).startswith("1,000 to 1,024 samples seen")


def test_a_picture_is_the_least_difference_that_counts() -> None:
    """Of 100 pictures each seed has one more right: that may well be chance."""
    a, b = ((("lock", name),) for name in ("text", "none"))
    done = outcome({"lock": ["text", "none"]}, {a: 0.3, b: 0.31})
    assert "none against text" in describe_findings(done)
    few = [one.model_copy(update={"metrics": {**one.metrics, "val/rows": 100.0}}) for one in done.results]
    said = describe_findings(Outcome(done.sweep, few, {}))
    assert "Against text not distinguishable at this budget: none. They may differ by up to 3.5 points." in said


@pytest.mark.parametrize("numeric", [True, False])
def test_the_figure(numeric: bool, tmp_path: Path) -> None:
    labels = ["64", "128", "256", "512"] if numeric else ["a", "b", "$x_1$", "d"]
    heights = {(("size", label), ("rule", rule)): 0.3 for label in labels for rule in ("sqrt", "linear")}
    done = outcome({"size": labels, "rule": ["sqrt", "linear"]}, heights)
    measured = {metric: done.values(metric) for metric in ("zero_shot/top1", "space/gap", "absent")}
    png, svg = draw_figure(tmp_path / "figure", "Which?", "1,000 samples", measured, done.complete_arms)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in svg.read_bytes()
    with pytest.raises(ValueError, match="no value"):
        draw_figure(tmp_path / "none", "", "", {"absent": {}}, done.complete_arms)


@pytest.mark.parametrize("numeric", [True, False])
def test_points_and_bars_stand_where_they_belong(numeric: bool) -> None:
    """An arm that lacks a seed has points, and neither mean nor interval nor part in the fit."""
    labels = ["64", "128", "256", "512", "1024"] if numeric else ["a", "b", "c", "d", "e"]
    heights = {(("size", label),): 0.1 * place for place, label in enumerate(labels, start=1)}
    whole = outcome({"size": labels}, heights)
    done = Outcome(whole.sweep, whole.results[:-1], {"lost": "it broke"})
    values, axes = done.values("zero_shot/top1"), new_figure(4, 3).subplots()
    if numeric:
        plot_over_numbers(axes, "zero_shot/top1", values, done.complete_arms)
    else:
        plot_by_arm(axes, "zero_shot/top1", values, list(heights), done.complete_arms)
    places = [64, 128, 256, 512, 1024] if numeric else range(5)
    swap = slice(None) if numeric else slice(None, None, -1)
    clouds = [cloud for cloud in axes.collections if isinstance(cloud, PathCollection)]
    drawn = [tuple(point[swap]) for cloud in clouds for point in np.asarray(cloud.get_offsets())]
    wanted = [(x, y) for x, own in zip(places, values.values(), strict=True) for y in own.values()]
    assert np.allclose(sorted(drawn), sorted(wanted))
    bars = [segment[:, swap] for bar in axes.containers for segment in bar.lines[2][0].get_segments()]
    expected = [estimate(list(own.values())) for own in list(values.values())[:4]]
    assert [bar[0, 0] for bar in bars] == pytest.approx(list(places)[:4])
    assert [tuple(bar[:, 1]) for bar in bars] == [pytest.approx((one.low, one.high)) for one in expected]
    if numeric:
        (curve,) = [line for line in axes.lines if line.get_linestyle() == ":"]
        assert max(curve.get_xdata()) == pytest.approx(512)


def test_a_metric_must_be_given() -> None:
    with pytest.raises(ConfigError, match="metrics"):
        parse(Sweep, {"name": "s", "base": "b", "axes": {"optim.lr": [1]}, "samples": 1, "metrics": []})

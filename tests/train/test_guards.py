"""Steps that go wrong: skipped on every rank alike, counted, told with their place in the plan, and too many end the run."""

import io
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.gloo import on_ranks
from helpers.steps import batch, experiment, made, poisoned, share_of
from helpers.training import Reports, blocks, load_train_state, prepare_job, train_reader, weights
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from nev.config.experiment import Experiment
from nev.config.train import Guards
from nev.data.block import Block
from nev.models.dual_encoder import DualEncoder
from nev.models.precision import Precision, choose_precision
from nev.models.text import TextTower, load_text
from nev.runs.manifest import latest_checkpoint, read_manifest
from nev.runs.tracking import Tracker
from nev.train.core.optim import make_optimizer
from nev.train.core.step import train_step
from nev.train.driver.early_stopping import EarlyStopping
from nev.train.driver.metrics import MetricsLogger
from nev.train.driver.monitor import TrainMonitor
from nev.train.driver.step_progress import StepProgress
from nev.train.job import Job, find_resume_point
from nev.train.messages import Metrics, Note, open_mailbox
from nev.train.worker.guards import MEMORY, WINDOW, Diverged, GuardState, judge
from nev.train.worker.loop import train
from nev.train.worker.quarantine import TooManyBadRows
from nev.train.worker.state import RankContext

Make = Callable[..., Experiment]
CPU = torch.device("cpu")
FP32 = Precision(CPU, torch.float32)


@pytest.fixture(scope="module")
def text() -> TextTower:
    torch.set_num_threads(1)
    return load_text(Experiment.model_fields["text"].default)


@given(st.lists(st.sampled_from([1.0, math.nan, math.inf, -math.inf]), max_size=40), st.integers(1, 400))
def test_skipped_steps_are_counted_over_a_window_and_leave_the_mean_alone(losses: list[float], stride: int) -> None:
    history = GuardState()
    skipped = []
    for at, loss in enumerate(losses):
        history, kind = judge(history, at * stride, loss, 1.0, 6.0)
        if not math.isfinite(loss):
            skipped.append(at * stride)
        assert kind == (None if math.isfinite(loss) else "skipped")
    last = (len(losses) - 1) * stride
    assert history.skipped == tuple(step for step in skipped if step > last - WINDOW)
    assert history.skips == len(skipped)
    assert history.losses == len(losses) - len(skipped)
    assert history.mean == (1.0 if history.losses else 0.0)


def test_a_gradient_that_is_no_number_skips_as_a_loss_does() -> None:
    assert judge(GuardState(), 0, 1.0, math.nan, 6.0)[1] == "skipped"


def usual(steps: int) -> GuardState:
    history = GuardState()
    for step in range(steps):
        history, kind = judge(history, step, 5 + 0.1 * (-1) ** step, 1.0, 6.0)
        assert kind is None
    return history


def test_a_loss_far_above_its_past_is_a_spike_and_does_not_hide_the_next() -> None:
    history = usual(MEMORY)
    assert history.mean == pytest.approx(5)
    assert history.variance == pytest.approx(0.01, rel=0.01)
    assert judge(history, 100, 5.55, 1.0, 6.0)[1] is None
    assert judge(history, 100, 9.0, 1.0, None)[1] is None
    for step in range(100, 105):
        history, kind = judge(history, step, 50.0, 1.0, 6.0)
        assert kind == "spike"
    assert history.spikes == 5
    assert history.mean < 5.1
    assert judge(history, 105, 1.0, 1.0, 6.0)[1] is None  # below is no spike


def test_too_few_losses_are_no_past() -> None:
    assert judge(usual(MEMORY - 1), 99, 50.0, 1.0, 6.0)[1] is None


def test_a_loss_that_hardly_moves_has_no_spikes_in_its_ripples() -> None:
    history = GuardState()
    for step in range(200):
        history, _ = judge(history, step, 5.0, 1.0, 6.0)
    assert judge(history, 200, 5.2, 1.0, 6.0)[1] is None
    assert judge(history, 200, 5.4, 1.0, 6.0)[1] == "spike"


@pytest.mark.parametrize("part", [None, 8])
def test_a_step_without_a_finite_loss_changes_nothing(part: int | None) -> None:
    model, config = made().float(), experiment(micro_batch=part)
    optimizer = make_optimizer(model, config.optim)
    sound = batch(torch.float32)
    train_step(model, optimizer, sound, config, FP32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = [{name: tensor.clone() for name, tensor in slots.items()} for slots in optimizer.state.values()]
    result = train_step(model, optimizer, poisoned(sound), config, FP32)
    assert not result.loss.isfinite()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(
        torch.equal(slots[name], kept[name])
        for slots, kept in zip(optimizer.state.values(), moments, strict=True)
        for name in kept
    )
    train_step(model, optimizer, sound, config, FP32)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_gradient_that_overflows_changes_nothing_though_the_loss_is_finite() -> None:
    model, config = made().float(), experiment()
    optimizer = make_optimizer(model, config.optim)
    model.vision.head.weight.register_hook(lambda gradient: gradient * math.inf)
    before = model.vision.head.weight.detach().clone()
    result = train_step(model, optimizer, batch(torch.float32), config, FP32)
    assert result.loss.isfinite()
    assert not result.grad_norm.isfinite()
    assert torch.equal(model.vision.head.weight, before)


# Two processes


def _worker(rank: int) -> tuple[bool, Tensor]:
    torch.manual_seed(0)
    model, config = made().float(), experiment()
    wrapped = DistributedDataParallel(model)
    optimizer = make_optimizer(model, config.optim)
    given = share_of(batch(torch.float32), rank, 2)
    before = _weights(model)
    train_step(wrapped, optimizer, poisoned(given) if rank else given, config, FP32)
    skipped = torch.equal(before, _weights(model))
    train_step(wrapped, optimizer, given, config, FP32)
    return skipped, _weights(model)


def _weights(model: DualEncoder) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.slow
def test_all_ranks_skip_what_one_of_them_spoils(tmp_path: Path) -> None:
    (first, weights_0), (second, weights_1) = on_ranks(_worker, 2, tmp_path)
    assert first
    assert second
    assert torch.equal(weights_0, weights_1)


# Runs


def run(job: Job, stream: Iterator[Block]) -> tuple[dict[int, dict[str, float]], list[str]]:
    me = RankContext(0, 1, CPU, choose_precision("fp32", CPU))
    train_state, start = load_train_state(job, me)
    reports = Reports()
    train(job, me, train_state, start, stream, reports)
    return reports.metrics, reports.notes


def spoilt(stream: Iterator[Block], numbers: set[int]) -> Iterator[Block]:
    for block in stream:
        if int(block["block"][0]) in numbers:
            block["text"] = block["text"].copy()
            block["text"][5] = math.nan
        yield block


def test_what_went_wrong_is_reported_before_too_many_bad_rows_end_the_run(tiny: Make, text: TextTower) -> None:
    config = tiny(train__steps=4, train__log_every=2, data__max_bad_share=0.01)
    job, reader = prepare_job(config, text), train_reader(config, text)
    ctx = RankContext(0, 1, CPU, choose_precision("fp32", CPU))
    train_state, start = load_train_state(job, ctx)
    reports = Reports()

    def unusable() -> Iterator[Block]:
        for block in spoilt(blocks(reader, job.plan, 0, 4), {0}):
            block["valid"] = block["valid"].copy()
            block["valid"][8:24] = False
            yield block

    with pytest.raises(TooManyBadRows, match="64 of 128 rows could not be used"):
        train(job, ctx, train_state, start, unusable(), reports)
    assert list(reports.metrics) == [2]
    assert reports.metrics[2]["bad_rows"] == 64
    assert reports.metrics[2]["skipped_steps"] == 1
    assert [note.partition(" (")[0] for note in reports.notes] == [
        "step 0: no finite loss and gradient, the step is skipped"
    ]
    assert [file.name for file in Path(job.run, "guards").iterdir()] == ["step-00000000.json"]


@pytest.mark.slow
def test_a_run_tells_of_a_skipped_step_and_goes_on_as_it_would_have_in_one_piece(
    tiny: Make, text: TextTower, tmp_path: Path
) -> None:
    options = {"train__steps": 6, "train__checkpoint_every": 2, "train__log_every": 6, "train__keep_last": 9}
    whole, halves = tiny(name="whole", **options), tiny(name="halves", **options)
    job = prepare_job(whole, text)
    reader = train_reader(whole, text)
    bad = set(job.plan.step_blocks(3))
    reported, told = run(job, spoilt(blocks(reader, job.plan, 0, 6), bad))
    assert "skipped_steps" not in reported[2]
    assert reported[4]["skipped_steps"] == reported[6]["skipped_steps"] == 1
    assert reported[4].keys() & {"loss", "grad_norm"} == set()
    assert math.isfinite(reported[6]["loss"])
    first, last = min(bad), max(bad)
    assert [line.partition(" (")[0] for line in told] == ["step 3: no finite loss and gradient, the step is skipped"]
    assert f"blocks {first} to {last}, learning rate" in told[0]
    found = json.loads(Path(job.run, "guards/step-00000003.json").read_text())
    assert (found["kind"], found["step"], found["blocks"], found["loss"]) == ("skipped", 3, [first, last], None)
    shards = {
        job.shards[int(shard)]
        for number in bad
        for shard in next(reader.read_blocks(job.plan.make_window(number)))["shard"]
    }
    assert set(found["shards"]) == shards
    before, skipped, after = (weights(job.run, step) for step in (2, 4, 6))
    assert any(not torch.equal(before[name], skipped[name]) for name in before)  # step 2 was sound

    for stop in (4, 6):
        part = prepare_job(halves, text, stop_after=stop)
        begun = find_resume_point(part.run).step
        run(part, spoilt(blocks(reader, part.plan, begun, stop), bad))
    resumed = weights(part.run, 6)
    assert all(torch.equal(after[name], resumed[name]) for name in after)
    histories = [read_manifest(latest_checkpoint(one) or "")["history"] for one in (job.run, part.run)]
    assert histories[0] == histories[1]
    assert histories[0]["skipped"] == [3]
    assert histories[0]["losses"] == 5


@pytest.mark.slow
def test_a_run_tells_of_a_spike_with_its_place_in_the_plan_and_goes_on(tiny: Make, text: TextTower) -> None:
    config = tiny(name="leaps", train__steps=106, train__log_every=53, train__global_batch=32, optim__lr=1e-5, eval={})
    job, reader = prepare_job(config, text), train_reader(config, text)
    (leaping,) = job.plan.step_blocks(103)

    def stretched(stream: Iterator[Block]) -> Iterator[Block]:
        for block in stream:
            factor = 50 if int(block["block"][0]) == leaping else 1
            yield block | {"text": block["text"] * np.float16(factor)}

    reported, told = run(job, stretched(blocks(reader, job.plan, 0, 106)))
    (line,) = told
    assert re.fullmatch(
        rf"step 103: loss \S+, usual 3\.\d+ \(epoch 3, blocks {leaping} to {leaping}, learning rate .*; shards in .*guards\)",
        line,
    )
    assert reported[106]["loss_spikes"] == 1
    found = json.loads(Path(job.run, "guards/step-00000103.json").read_text())
    assert (found["kind"], found["step"], found["epochs"]) == ("spike", 103, [3])
    assert found["loss"] > 2 * found["usual_loss"]
    assert "skipped_steps" not in reported[106]
    assert read_manifest(latest_checkpoint(job.run) or "")["history"]["losses"] == 106


def test_past_the_limit_the_run_stops_and_says_where(tiny: Make, text: TextTower) -> None:
    config = tiny(name="stops", train__steps=20, train__log_every=4, guards__max_skipped=2)
    job, reader = prepare_job(config, text), train_reader(config, text)
    bad = {block for step in (1, 4, 6, 7) for block in job.plan.step_blocks(step)}
    with pytest.raises(Diverged) as stopped:
        run(job, spoilt(blocks(reader, job.plan, 0, 20), bad))
    said = str(stopped.value)
    assert "4 of the last 1,000 steps" in said
    assert "guards.max_skipped = 2: steps 1, 4, 6, 7. The last at learning rate" in said
    assert "loss None, gradient norm None, with rows of 0" in said
    assert job.shards[0] in said
    assert sorted(path.name for path in Path(job.run, "guards").iterdir()) == [
        f"step-{step:08d}.json" for step in (1, 4, 6, 7)
    ]
    assert latest_checkpoint(job.run) is None


def test_the_limit_and_the_bound_may_change_between_attempts(tiny: Make, text: TextTower) -> None:
    config = tiny(name="changed", train__steps=2)
    job = prepare_job(config, text)
    run(job, blocks(train_reader(config, text), job.plan, 0, 2))
    prepare_job(config.model_copy(update={"guards": Guards(max_skipped=0, spike_sigmas=None)}), text)


@pytest.mark.ray
def test_the_person_who_watches_is_told(ray_cluster: None, tiny: Make, tmp_path: Path) -> None:
    import ray

    console = Console(file=io.StringIO(), width=60)
    logger, stopping, progress = (
        MetricsLogger(Silent(), console),
        EarlyStopping(tiny().eval),
        StepProgress(console, 9, 0),
    )
    with open_mailbox(str(tmp_path)) as mailbox:
        monitor = TrainMonitor(mailbox, logger, [logger.log], stopping, progress)
        note = Note("step 3: [no] finite loss and gradient, and a line that no width may break")
        for message in (note, Metrics(4, {"loss": 1.0})):
            ray.get(mailbox.post.remote(message))
        monitor.poll()
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.splitlines()[0] == "step 3: [no] finite loss and gradient, and a line that no width may break"


class Silent(Tracker):
    """A tracker that nobody reads."""

    def __init__(self) -> None:
        pass

    def log(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def flush(self) -> None:
        pass

"""Which tower is trained: neither lock moves a bit of what it holds, and a text tower in the loop is trained exactly."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.gloo import on_ranks
from helpers.steps import CLOSE, CPU, FP32, ROWS, SIZE, TRUNK, VALID, WIDTH, batch, gradients, parts_of, share_of, steps
from helpers.training import blocks, load_train_state, prepare_job, run_bare, train_reader, weights
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import BertConfig, BertModel

from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.file import parse
from nev.data.block import Block
from nev.eval.evaluate import evaluate_checkpoint
from nev.eval.validation.scoring import score_validation
from nev.eval.validation.texts import read_captions
from nev.eval.validation.vectors import load_vectors
from nev.losses.contrastive import contrastive_loss
from nev.losses.gather import start_gather
from nev.models.digests import weight_digests
from nev.models.dual_encoder import DualEncoder, Embedded
from nev.models.text import TextTower, load_text
from nev.models.text_encoder import TextEncoder, unlock
from nev.models.vision import build_vision
from nev.runs.manifest import latest_checkpoint, read_manifest
from nev.runs.towers import load_logit_scale, load_text_tower
from nev.train.core.gradcache import backward_in_parts
from nev.train.core.optim import make_optimizer
from nev.train.core.parallel import distribute
from nev.train.core.state_dict import gather_tensors
from nev.train.core.step import Batch
from nev.train.worker.loop import TowerMoved, refuse_moved, train
from nev.train.worker.state import RankContext

Make = Callable[..., Experiment]
WORLD, STEPS, LONGEST = 2, 3, 7
NEAR = {"rtol": 1e-4, "atol": 1e-6}  # float32, sums in another order


@pytest.fixture(scope="module")
def text() -> TextTower:
    torch.set_num_threads(1)
    return load_text(Experiment.model_fields["text"].default)


# Steps, with small towers


def experiment(lock: str, **train: Any) -> Experiment:
    raw = {
        "name": "locks",
        "lock": lock,
        "data": {"train": "nowhere", "image_size": SIZE, "block_rows": 4},
        "vision": {"trunk": "vit_tiny_patch16_224", "weights": "nowhere.safetensors"},
        "loss": {"init_scale": 10.0},
        "optim": {"lr": 0.01, "eps": 1e-3, "clip_norm": 0.05, "weight_decay": 0.1},
        "train": {"global_batch": ROWS, "steps": STEPS, **train},
    }
    return parse(Experiment, raw)


def made(lock: str, dropout: float = 0.0) -> DualEncoder:
    torch.manual_seed(1)
    trunk = {name: value if "rate" not in name else min(value, dropout) for name, value in TRUNK.items()}
    config = experiment(lock).vision.model_copy(update={"trunk_args": trunk, "weights": None, "pool": "map"})
    bert = BertModel(
        BertConfig(
            vocab_size=50,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        ),
        add_pooling_layer=False,
    )
    text = TextEncoder(bert, "mean", layer_norm=False, pad=0)
    return DualEncoder(build_vision(config, SIZE, WIDTH), experiment(lock).loss, text, lock == "image").train()


def tokenised() -> Batch:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, 50, (ROWS, LONGEST), generator=generator, dtype=torch.int32)
    lengths = torch.randint(1, LONGEST + 1, (ROWS, 1), generator=generator)
    return Batch(batch().images, torch.where(torch.arange(LONGEST) < lengths, tokens, -1), VALID)


def both(model: nn.Module, given: Batch, rows: slice) -> Embedded:
    """In float64 throughout: both towers end in float32."""
    assert isinstance(model, DualEncoder)
    assert model.text
    pixels = given.images[rows].permute(0, 3, 1, 2).double() / 255
    words = model.text.model(input_ids=given.text[rows].clamp(min=0)).last_hidden_state[:, 0]
    return (normalize(model.vision.features(pixels)), normalize(words)), (model.log_scale,)


def loss_of_both(given: Batch, vectors: Any, scalars: Any) -> Any:
    return contrastive_loss(vectors[0], start_gather(vectors[1], given.valid), scalars[0])


def test_parts_of_both_sides_give_the_gradient_of_the_whole_under_dropout() -> None:
    model, other, given = made("none", 0.2).double(), made("none", 0.2).double(), tokenised()
    torch.manual_seed(5)
    found = [both(other, given, rows) for rows in parts_of(4)]
    sides = [torch.cat(side) for side in zip(*(vectors for vectors, _ in found), strict=True)]
    want = loss_of_both(given, sides, found[0][1]).loss
    want.backward()
    torch.manual_seed(5)
    embed = functools.partial(lambda given, model, rows: both(model, given, rows), given)
    got = backward_in_parts(model, parts_of(4), embed, functools.partial(loss_of_both, given), CPU)
    torch.testing.assert_close(got.loss.detach(), want.detach(), **CLOSE)
    expected, found_here = gradients(other), gradients(model)
    assert found_here.keys() == expected.keys()
    assert any(name.startswith("text.") for name in expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found_here[name], gradient, **CLOSE)


def _trains(rank: int, lock: str, train: dict[str, Any]) -> dict[str, Any]:
    config, model = experiment(lock, **train), made(lock)
    wrapped = distribute(model, config.train.fsdp, WORLD, CPU)
    optimizer = make_optimizer(model, config.optim)
    given = share_of(tokenised(), rank, WORLD)
    found = steps(wrapped, optimizer, config, given, STEPS)
    return {"found": found, **gather_tensors(model, optimizer).model}


@pytest.mark.slow
@pytest.mark.parametrize("lock", ["none", "image"])
@pytest.mark.parametrize("train", [{}, {"micro_batch": 4}, {"micro_batch": 6, "fsdp": True}])
def test_two_processes_train_what_one_does(lock: str, train: dict[str, Any], tmp_path: Path) -> None:
    model = made(lock)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = experiment(lock)
    results = steps(model, make_optimizer(model, config.optim), config, tokenised(), STEPS)
    for name, tensor in model.state_dict().items():
        still = name.startswith("vision.") if lock == "image" else name.endswith("position_ids")
        assert torch.equal(tensor, before[name]) == still, name
    for rank in on_ranks(functools.partial(_trains, lock=lock, train=train), WORLD, tmp_path):
        torch.testing.assert_close(rank.pop("found"), results, **NEAR)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(rank[name], tensor, **NEAR, msg=lambda said, name=name: f"{name}: {said}")


def test_a_locked_vision_tower_never_drops_out() -> None:
    model = made("image", 0.5)
    pixels = torch.rand(2, 3, SIZE, SIZE)
    assert model.training
    assert torch.equal(model.vision(pixels), model.vision(pixels))
    unlocked = made("none", 0.5)
    assert not torch.equal(unlocked.vision(pixels), unlocked.vision(pixels))


def test_what_no_loss_reaches_is_not_trained() -> None:
    bert = BertModel(BertConfig(vocab_size=50, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2))
    encoder = TextEncoder(bert.requires_grad_(False).eval(), "mean", layer_norm=False, pad=0)
    unlock(encoder, few_activations=False)
    idle = {name for name, parameter in encoder.named_parameters() if not parameter.requires_grad}
    assert idle == {"model.pooler.dense.weight", "model.pooler.dense.bias"}
    assert encoder.training
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_a_text_tower_that_keeps_few_activations_has_the_same_gradient() -> None:
    found = []
    for few in (False, True):
        encoder = made("none").text
        assert encoder
        unlock(encoder, few_activations=few)
        held = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal held
            held += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            vectors = encoder(tokenised().text)
        (vectors * torch.arange(1.0, WIDTH + 1)).sum().backward()
        found.append((gradients(encoder), held))
    (wanted, all_of_it), (got, little) = found
    assert little < all_of_it / 2
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, **NEAR)


# Tokens


# Runs


@pytest.mark.slow
def test_without_a_lock_both_towers_learn_and_go_on_bit_for_bit(tiny: Make, small_text: dict[str, object]) -> None:
    """With the text tower's own dropout."""
    options = {**small_text, "lock": "none", "train__steps": 4, "train__checkpoint_every": 2, "train__micro_batch": 32}
    whole, halves = tiny(name="whole", **options), tiny(name="halves", **options)
    text = load_text(whole.text)
    reader, job = train_reader(whole, text), prepare_job(whole, text)
    reported = run_bare(job, reader)
    run_bare(prepare_job(halves, text, stop_after=2), reader)
    rest = run_bare(prepare_job(halves, text), reader)
    assert rest[4]["loss"] == reported[4]["loss"]
    one, other = (weights(prepare_job(config, text).run, 4) for config in (whole, halves))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)

    newest = latest_checkpoint(job.run)
    assert newest
    tower = load_text_tower(newest, whole)
    assert tower.fingerprint != text.fingerprint
    moved = weight_digests(tower.model)
    still = {name for name, digest in weight_digests(text.model).items() if moved[name] == digest}
    assert not {name for name in still if "position_ids" not in name}
    assert job.validation
    embedded, texts = load_vectors(newest, job.validation) or pytest.fail("not kept")
    metrics = dict(read_manifest(newest)["metrics"])
    assert metrics.pop("space/text_drift") > 0  # of the tower, not of what it scores
    assert score_validation(job.validation, embedded, texts, load_logit_scale(newest)) == metrics
    assert texts.captions is not None
    np.testing.assert_allclose(texts.captions[:8], tower.encode(captions(job)[:8]), atol=1e-5)


def captions(job: Any) -> list[str]:
    return [caption for of_row in read_captions(job.validation.reader.index) for caption in of_row]


@pytest.mark.slow
def test_a_locked_image_side_does_not_move(tiny: Make, small_text: dict[str, object]) -> None:
    first = tiny(name="first", train__steps=3, **small_text)
    text = load_text(first.text)
    job = prepare_job(first, text)
    run_bare(job, train_reader(first, text))
    file = f"{latest_checkpoint(job.run)}/model.safetensors"
    config = tiny(name="second", lock="image", vision__weights=file, train__steps=12, **small_text)
    reported = run_bare(prepare_job(config, text), train_reader(config, text))
    before, after = weights(job.run, 3), weights(prepare_job(config, text).run, 12)
    vision = {name for name in after if name.startswith("vision.")}
    assert vision == {name for name in before if name.startswith("vision.")}
    assert all(torch.equal(before[name], after[name]) for name in vision)
    assert reported[12]["loss"] < reported[1]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("lock", ["image", "text"])
def test_a_locked_tower_that_moves_voids_the_run(lock: str, tiny: Make, text: TextTower, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    tower = build_vision(tiny().vision, 32, text.width).state_dict()
    save_file({f"vision.{name}": tensor for name, tensor in tower.items()}, file)
    config = tiny(lock=lock, text__mode="online", vision__weights=str(file), train__steps=2, data__val=None, eval={})
    job, me = prepare_job(config, text), RankContext(0, 1, CPU, FP32)
    train_state, start = load_train_state(job, me)
    held = train_state.model.vision if lock == "image" else train_state.tower.model  # type: ignore[union-attr]

    def pushing() -> Iterator[Block]:
        for block in blocks(train_reader(config, text), job.plan, 0, 2):
            with torch.no_grad():
                next(held.parameters()).add_(1e-3)
            yield block

    with pytest.raises(TowerMoved, match=rf"the {lock.replace('image', 'vision')} tower is locked, but 1 of its"):
        train(job, me, train_state, start, pushing(), lambda *_: None)


def _one_moves(rank: int) -> str:
    model = made("none")
    held = {"vision tower": (model.vision, weight_digests(model.vision))}
    refuse_moved(held, WORLD)
    if rank == 1:
        with torch.no_grad():
            model.vision.head.weight[0, 0] += 1
    try:
        refuse_moved(held, WORLD)
    except TowerMoved as error:
        return str(error)
    return "nothing"


@pytest.mark.slow
def test_a_locked_tower_that_moves_on_one_rank_stops_all(tmp_path: Path) -> None:
    first, second = on_ranks(_one_moves, WORLD, tmp_path)
    assert first == second
    assert re.match(r"the vision tower is locked, but 1 of its \d+ weights changed \(head\.weight\)", first)


def test_an_evaluation_keeps_to_the_lock_of_its_checkpoint(tiny: Make, text: TextTower) -> None:
    config = tiny(train__steps=1, eval={}, data__val=None)
    job = prepare_job(config, text)
    run_bare(job, train_reader(config, text))
    with pytest.raises(ConfigError, match="was trained with lock: text, which decides whose weights it holds"):
        evaluate_checkpoint(str(latest_checkpoint(job.run)), ["lock=none"], Console(quiet=True))


@pytest.mark.slow
def test_both_towers_train_in_bf16(tiny: Make, small_text: dict[str, object]) -> None:
    found = []
    options = {**small_text, "lock": "none", "train__steps": 3, "eval": {}, "data__val": None}
    for precision in ("fp32", "bf16"):
        config = tiny(name=precision, train__precision=precision, **options)
        text = load_text(config.text)
        found.append(run_bare(prepare_job(config, text), train_reader(config, text)))
    for step in (1, 2, 3):
        assert found[1][step]["loss"] == pytest.approx(found[0][step]["loss"], rel=0.05)


def test_locks_that_cannot_be_are_refused(tiny: Make, text: TextTower, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lock: image would lock random weights: give vision\.weights"):
        tiny(lock="image")
    with pytest.raises(ConfigError, match=r"lock: none trains the text tower, so sidecars cannot hold its vectors"):
        tiny(lock="none", text__mode="sidecar")
    trunk = build_vision(tiny().vision, 32, text.width).trunk.state_dict()
    save_file(trunk, tmp_path / "trunk.safetensors")
    config = tiny(lock="image", vision__weights=str(tmp_path / "trunk.safetensors"))
    with pytest.raises(ConfigError, match=r"brings the trunk's alone, and the tower has pool\..* besides"):
        prepare_job(config, text)

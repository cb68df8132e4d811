"""A batch in parts has the gradient of the whole: dropout and drop-path included, alone and over two processes."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.gloo import on_ranks
from helpers.steps import (
    CLOSE,
    CPU,
    ROWS,
    VALID,
    WIDTH,
    against,
    batch,
    embed,
    experiment,
    gradients,
    in_parts,
    made,
    parts_of,
    share_of,
)
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from nev.config.base import ConfigError
from nev.config.model import Vision
from nev.losses.contrastive import contrastive_loss
from nev.models.dual_encoder import Embedded
from nev.models.precision import Precision
from nev.models.vision import build_vision
from nev.train.core.gradcache import backward_in_parts, refuse_batch_norm
from nev.train.core.optim import make_optimizer
from nev.train.core.rng import rng_state
from nev.train.core.step import Batch, train_step


def whole_graph(model: nn.Module, given: Batch, part_rows: int) -> Tensor:
    """The loss by a graph over all parts at once, whose dropout is drawn as the parts draw it."""
    found = [embed(given)(model, part) for part in parts_of(part_rows)]
    vectors = torch.cat([vectors for (vectors,), _ in found])
    loss = contrastive_loss(vectors, given.text, found[0][1][0], given.valid).loss
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("part_rows", [1, 4, 12])
def test_parts_give_the_gradient_of_the_whole_under_dropout(part_rows: int) -> None:
    model, other, given = made(), made(), batch()
    torch.manual_seed(5)
    want = whole_graph(other, given, part_rows)
    after = rng_state(CPU)["cpu"]
    torch.manual_seed(5)
    got = in_parts(model, given, part_rows)
    torch.testing.assert_close(got.loss.detach(), want, **CLOSE)
    assert got.pairs == VALID.sum()
    expected, found = gradients(other), gradients(model)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **CLOSE)
    assert torch.equal(rng_state(CPU)["cpu"], after), "the next step draws what it would have drawn"


def test_dropout_was_on() -> None:
    model, given = made(), batch()
    torch.manual_seed(5)
    first = whole_graph(model, given, 4)
    torch.manual_seed(6)
    assert abs(whole_graph(model, given, 4) - first) > 1e-3


def test_without_dropout_parts_equal_one_forward() -> None:
    model, other, given = made().eval(), made().eval(), batch()
    whole_graph(other, given, ROWS)
    in_parts(model, given, 8)
    for name, gradient in gradients(other).items():
        torch.testing.assert_close(gradients(model)[name], gradient, **CLOSE)


def test_a_scale_that_is_not_learned_stays() -> None:
    model, given = made(learn_scale=False), batch()
    in_parts(model, given, 8)
    assert model.log_scale.grad is None
    assert model.vision.head.weight.grad is not None


def test_one_part_at_a_time_is_in_memory() -> None:
    """Of the graph, what is kept for the backward is one part's."""
    model, given = made(), batch()
    held = most = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal held, most
        held += 1
        most = max(most, held)
        return tensor

    def counted(model: nn.Module, rows: slice) -> Embedded:
        nonlocal held
        held = 0  # the graph of the part before is gone: its backward has run
        return embed(given)(model, rows)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        backward_in_parts(model, parts_of(4), counted, against(given), CPU)
        of_a_part, most = most, 0
        whole_graph(made(), given, 4)
    assert of_a_part < most / 3


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_step_in_parts_is_the_step(kind: str) -> None:
    given = batch(torch.float16)
    results = {}
    for part in (None, 8):
        model = made(kind=kind).float().eval()
        config = experiment(micro_batch=part)
        config = config.model_copy(update={"loss": config.loss.model_copy(update={"kind": kind})})
        result = train_step(model, make_optimizer(model, config.optim), given, config, Precision(CPU, torch.float32))
        results[part] = result, gradients(model)
    (whole, wanted), (parts, found) = results.values()
    for ours, theirs in zip(whole, parts, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert found.keys() == wanted.keys()
    assert ("bias" in wanted) == (kind == "sigmoid")
    for name, gradient in wanted.items():  # as they were clipped
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_parts_must_divide_a_workers_share() -> None:
    with pytest.raises(ConfigError, match=r"train\.micro_batch \(5\) must divide .* 24 rows at W = 1"):
        experiment(micro_batch=5)
    assert experiment(micro_batch=1000).train.micro_batch == 1000  # more than the share: the whole at once


def test_batch_norm_is_refused_by_name() -> None:
    vision = build_vision(Vision(trunk="resnet18", pool="mean"), 64, WIDTH)
    with pytest.raises(ConfigError, match=r"train\.micro_batch: trunk\.bn1 is a batch norm"):
        refuse_batch_norm(vision.train(), "train.micro_batch")
    refuse_batch_norm(made(), "train.micro_batch")
    refuse_batch_norm(vision.eval(), "train.micro_batch")  # it knows its statistics then


# Two processes


class Pair(nn.Module):
    """What `embed` does, as a forward that DDP can wrap."""

    def __init__(self) -> None:
        super().__init__()
        self.model = made()

    def forward(self, pixels: Tensor) -> Embedded:
        return (normalize(self.model.vision.features(pixels)),), (self.model.log_scale + 0,)


def _worker(rank: int) -> dict[str, Any]:
    given = share_of(batch(), rank, 2)
    got: dict[str, Any] = {}
    for parts in (False, True):
        torch.manual_seed(7 + rank)
        model = DistributedDataParallel(Pair())
        calls: Counter[str] = Counter()

        def counted(
            state: object, bucket: dist.GradBucket, calls: Counter[str] = calls
        ) -> torch.futures.Future[Tensor]:
            calls["buckets"] += 1
            return dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda f: f.value()[0])

        model.register_comm_hook(None, counted)
        torch.manual_seed(7 + rank)
        if parts:
            in_parts(model, given, 4)
        else:
            with model.no_sync():
                early = [embed(given)(model, part) for part in parts_of(4, 8)]
            late = embed(given)(model, slice(8, None))
            vectors = torch.cat([v for (v,), _ in (*early, late)])
            contrastive_loss(vectors, given.text, late[1][0], given.valid).loss.backward()
        got[f"{parts}"] = {**gradients(model), "buckets": calls["buckets"]}
    return got


def test_two_processes_reduce_once_and_agree_with_the_whole(tmp_path: Path) -> None:
    found = on_ranks(_worker, 2, tmp_path)
    assert found[0]["True"]["buckets"] == found[0]["False"]["buckets"] >= 1
    for rank in range(2):
        for name, gradient in found[0]["False"].items():
            if name != "buckets":
                torch.testing.assert_close(found[rank]["True"][name], gradient, **CLOSE)

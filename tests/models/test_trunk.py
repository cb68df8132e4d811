"""What a trunk is built from and what is taken out of it, which tokens a pool reads, and the try of a tower before a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nev.config.base import ConfigError
from nev.config.model import Vision
from nev.models import trunk as trunks
from nev.models.create_trunk import create_trunk
from nev.models.pools import build_pool, count_prefix, has_class_token
from nev.models.trunk import build_trunk
from nev.models.trunk_trace import encode_images, trace_trunk
from nev.models.vision import build_vision, check_vision

SIZE, WIDTH = 32, 24
VIT = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
IMAGES = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def of(trunk: str, pool: str = "mean", **args: Any) -> Vision:
    return Vision(trunk=trunk, trunk_args=args, pool=pool)


# Arguments


def test_a_models_own_arguments_are_errors_beside_nevs_that_it_does_not_take() -> None:
    """timm says it in other words for MetaFormer: `unexpected keyword argument(s): ['img_size', 'mlp_actz']`."""
    with pytest.raises(ConfigError, match=r"takes no argument 'mlp_actz'\. Close: .*mlp_act"):
        build_trunk(of("poolformerv2_s12", mlp_actz=0.1), SIZE)
    with pytest.raises(ConfigError, match=r"takes no argument 'patchsize'\. Close: patch_size"):
        build_trunk(of("deit_tiny_distilled_patch16_224", patchsize=8), SIZE)
    with pytest.raises(ConfigError, match=r"timm's 'volo_d1_224' sets 'layers' itself: leave it out"):
        build_trunk(of("volo_d1_224", layers=[1, 1, 1, 1]), SIZE)
    with pytest.raises(ConfigError, match=r"cannot be built with trunk_args \{'num_heads': 5\}.* 32 x 32 .*divisible"):
        build_trunk(of("deit_tiny_distilled_patch16_224", num_heads=5), SIZE)


@pytest.mark.parametrize(
    ("trunk", "args", "taken"),
    [
        ("vit_tiny_patch16_224", VIT, {"img_size": SIZE, "global_pool": "", "num_classes": 0}),
        ("poolformerv2_s12", {}, {"global_pool": "", "num_classes": 0}),
        ("deit_tiny_distilled_patch16_224", VIT, {"img_size": SIZE, "num_classes": 0}),
        ("inception_next_atto", {}, {"num_classes": 0}),
    ],
)
def test_as_many_of_nevs_arguments_are_given_as_a_model_takes(
    trunk: str, args: dict[str, Any], taken: dict[str, Any]
) -> None:
    with torch.device("meta"):
        made = create_trunk(of(trunk, **args), SIZE)
    assert {name: made._model_args[name] for name in made._model_args if name not in args} == taken


def test_a_trunk_reads_pictures_of_the_configured_size() -> None:
    with pytest.raises(
        ConfigError, match=r"'pit_ti_224' is not usable for pictures of 8 x 8 pixels: .*timm has it at 224"
    ):
        build_trunk(of("pit_ti_224", "own"), 8)
    assert build_trunk(of("vit_tiny_patch16_224", **VIT), 40).output_shape == (26, 48)


# Parts


@pytest.mark.parametrize(
    ("trunk", "args", "removed"),
    [
        ("test_efficientnet", {}, ()),  # conv_head gives the tokens
        ("lcnet_035", {}, ("conv_head",)),  # of MobileNetV3: behind the pooling
        ("lowformer_b0", {}, ("in_conv", "pre_classifier")),  # names that no other model has
        ("vit_tiny_patch16_224", VIT, ()),
        ("eva02_tiny_patch14_224", VIT, ()),
        ("test_convnext", {}, ("head",)),
    ],
)
def test_a_part_is_removed_where_no_token_depends_on_it(trunk: str, args: dict[str, Any], removed: Any) -> None:
    with torch.device("meta"):
        whole = create_trunk(of(trunk, **args), SIZE)
        made = build_trunk(of(trunk, **args), SIZE)
    assert made.removed == removed
    kept = [name for name, _ in whole.named_parameters() if name.split(".")[0] not in removed]
    assert [name for name, _ in made.named_parameters()] == kept


def test_what_is_removed_changes_no_token() -> None:
    for name, pool in [("lcnet_035", "mean"), ("test_convnext", "mean"), ("test_efficientnet", "own")]:
        torch.manual_seed(0)
        whole = create_trunk(of(name, pool), SIZE).eval()
        torch.manual_seed(0)
        made = build_trunk(of(name, pool), SIZE).eval()
        assert torch.equal(encode_images(made, IMAGES, pool, name), encode_images(whole, IMAGES, pool, name))


def test_weights_of_the_head_that_gives_tokens_are_loaded(tmp_path: Path) -> None:
    """`conv_head` is a part of EfficientNet's trunk, and a part behind MobileNetV3's."""
    for name, loaded in (("test_efficientnet", True), ("lcnet_035", False)):
        source = create_trunk(of(name, "own"), SIZE).state_dict()
        assert "conv_head.weight" in source
        save_file(source, tmp_path / f"{name}.safetensors")
        config = of(name).model_copy(update={"weights": str(tmp_path / f"{name}.safetensors")})
        state = build_vision(config, SIZE, WIDTH).trunk.state_dict()
        assert ("conv_head.weight" in state) == loaded
        assert all(torch.equal(tensor, source[key]) for key, tensor in state.items())


def test_weights_of_removed_parts_are_let_go(tmp_path: Path) -> None:
    source = create_trunk(of("lowformer_b0", "own"), SIZE).state_dict()
    save_file(source, tmp_path / "trunk.safetensors")
    config = of("lowformer_b0").model_copy(update={"weights": str(tmp_path / "trunk.safetensors")})
    assert not {name.split(".")[0] for name in build_vision(config, SIZE, WIDTH).trunk.state_dict()} & {"in_conv"}


def test_efficientnet_trains_under_ddp(tmp_path: Path) -> None:
    """DDP raises in the second step where a parameter has had no gradient in the first."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(build_vision(of("test_efficientnet"), SIZE, WIDTH))
        for _ in range(2):
            model(IMAGES).sum().backward()
    finally:
        dist.destroy_process_group()


# The trace


def test_a_trace_changes_neither_the_trunk_nor_random_numbers() -> None:
    trunk = create_trunk(of("test_efficientnet", drop_path_rate=0.5), SIZE)
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    state = torch.get_rng_state()

    def draw(*_: Any) -> None:
        torch.rand(3, device="cpu")  # as DINOv3 draws the places of patches

    trunk.bn2.register_forward_pre_hook(draw)
    trace_trunk(trunk, SIZE, "mean", "test")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trunk.state_dict().items())
    assert all(tensor.device.type == "cpu" for tensor in trunk.state_dict().values())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")])
def test_a_trunk_is_the_same_however_the_caller_computes(mode: Any) -> None:
    """transformers builds an export without gradients, on the meta device."""
    expected = build_trunk(of("test_convnext"), SIZE)
    with mode():
        made = build_trunk(of("test_convnext"), SIZE)
    assert made.state_dict().keys() == expected.state_dict().keys()
    assert made.output_shape == expected.output_shape == (1, 64)


# Tokens


@pytest.mark.parametrize(
    ("trunk", "args", "prefix"),
    [
        ("volo_d1_224", {}, 1),
        ("coat_lite_tiny", {"serial_depths": [1, 1, 1, 1]}, 1),
        ("cait_xxs24_224", {"embed_dim": 48, "depth": 2, "num_heads": 2}, 1),
        ("deit_tiny_distilled_patch16_224", VIT, 2),
        ("vit_tiny_patch16_224", {**VIT, "reg_tokens": 3}, 4),
    ],
)
def test_the_mean_leaves_out_every_token_that_is_no_patch(trunk: str, args: dict[str, Any], prefix: int) -> None:
    tower = build_vision(of(trunk, **args), SIZE, WIDTH).eval()
    assert count_prefix(tower.trunk) == prefix
    tokens = tower.trunk.forward_features(IMAGES)
    expected = tokens[:, prefix:].mean(dim=1)
    torch.testing.assert_close(tower.pool(tower.tokens(IMAGES)), expected)
    patches = tokens.shape[1] - prefix
    assert patches == round(patches**0.5) ** 2, "what is left is a square of patches"


def test_volos_class_token_is_in_cls_alone() -> None:
    """Its class attention changes no patch, so the mean of the patches cannot depend on the class token."""
    for pool, moves in [("mean", False), ("cls", True), ("cls+mean", True)]:
        tower = build_vision(of("volo_d1_224", pool), SIZE, WIDTH).eval()
        before = tower(IMAGES)
        with torch.no_grad():
            tower.trunk.cls_token += 1
        assert torch.equal(before, tower(IMAGES)) != moves


@pytest.mark.parametrize("trunk", ["pit_ti_224", "pit_ti_distilled_224"])
def test_pit_gives_its_class_token_alone(trunk: str) -> None:
    with torch.device("meta"):
        made = build_trunk(of(trunk), 64)
        for pool in ("mean", "map", "nomic", "cls+mean"):
            with pytest.raises(ConfigError, match=f"{trunk}.*gives its class token alone: use pool cls or own"):
                build_pool(of(trunk, pool), made)
        assert build_pool(of(trunk, "cls"), made)[1] == made.num_features


def test_a_register_is_no_class_token() -> None:
    args = {**VIT, "class_token": False, "reg_tokens": 2}
    trunk = build_trunk(of("vit_tiny_patch16_224", **args), SIZE)
    assert (count_prefix(trunk), has_class_token(trunk)) == (2, False)
    with pytest.raises(ConfigError, match=r"reads the class token, and trunk .* has none"):
        build_pool(of("vit_tiny_patch16_224", "cls", **args), trunk)


# The try of a tower


class Odd(nn.Module):
    """A trunk of two layers, with what a model of timm may have wrong."""

    num_features = 8

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.block = nn.ModuleDict({"norm": nn.BatchNorm2d(8), "spare": nn.Linear(8, 8)})

    def forward_features(self, x: Tensor) -> Tensor:
        if self.fault == "raises" and x.device.type == "cpu":
            raise ZeroDivisionError("a window of 0")
        x = self.block["norm"](self.stem(x))
        if self.fault != "idle":
            x = self.block["spare"](x.movedim(1, -1)).movedim(-1, 1)
        return {"infinite": x / 0, "gradient": x + (0 * x).sqrt()}.get(self.fault, x)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "idle",
            r"'odd' with pool 'mean' has parameters that no loss reaches: trunk\.block\.spare\.weight, trunk\.block",
        ),
        ("infinite", r"'odd' .* at 32 x 32 pixels: not finite are its vectors"),
        ("gradient", r"not finite are the gradient of trunk\.stem\.weight"),
        ("raises", r"'odd' .* cannot embed pictures of 32 x 32 pixels: ZeroDivisionError: a window of 0"),
    ],
)
def test_a_tower_is_tried_before_a_run(fault: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunks, "create_trunk", lambda config, size: Odd(fault))
    with pytest.raises(ConfigError, match=message):
        check_vision(of("odd"), SIZE, WIDTH)


def test_a_sound_tower_passes_and_a_locked_one_may_have_idle_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunks, "create_trunk", lambda config, size: Odd("none"))
    state = torch.get_rng_state()
    check_vision(of("odd"), SIZE, WIDTH)
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(trunks, "create_trunk", lambda config, size: Odd("idle"))
    check_vision(Vision(trunk="odd", pool="mean", pretrained=True), SIZE, 8, locked=True)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    state = build_vision(of("vit_tiny_patch16_224", **VIT), SIZE, WIDTH).trunk.state_dict()
    state["norm.weight"][3] = float("nan")
    save_file(state, tmp_path / "trunk.safetensors")
    config = of("vit_tiny_patch16_224", **VIT).model_copy(update={"weights": str(tmp_path / "trunk.safetensors")})
    with pytest.raises(ConfigError, match=r"not finite are its vectors.*look at vision\.weights .*trunk\.safetensors"):
        check_vision(config, SIZE, WIDTH)


def test_no_weights_are_made_for_a_large_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("numbers for a large tower")

    monkeypatch.setattr("nev.models.vision.check_numbers", refuse)
    check_vision(of("vit_base_patch16_224"), SIZE, WIDTH)  # many weights
    check_vision(of("test_vit", patch_size=2), 160, WIDTH)  # many operations
    with pytest.raises(AssertionError, match="numbers"):
        check_vision(of("test_vit"), 160, WIDTH)

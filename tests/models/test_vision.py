"""The vision tower: trunks, heads, weights, and the errors a user meets."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from nev.config.base import ConfigError
from nev.config.model import Vision
from nev.models.vision import build_vision, normalise

VIT = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}


def vit(**changes):
    """A Vision config of a tiny ViT."""
    args = {**VIT, **changes.pop("trunk_args", {})}
    return Vision(**{"trunk": "vit_tiny_patch16_224", "trunk_args": args, **changes})


@pytest.mark.parametrize("pool", ["nomic", "map", "cls", "mean"])
def test_unit_vectors_and_every_parameter_learns(pool):
    tower = build_vision(vit(pool=pool), image_size=32, width=24)
    out = tower(torch.randn(3, 3, 32, 32))
    assert out.dtype == torch.float32
    assert out.shape == (3, 24) == (3, tower.width)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(3))
    (out * torch.randn(3, 24)).sum().backward()
    assert [name for name, weight in tower.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize(
    ("trunk", "args"),
    [
        ("eva02_tiny_patch14_224", {"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 4}),
        ("vit_base_patch16_siglip_224", {**VIT, "class_token": True}),
        ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}),  # a feature map, channels first
        ("swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}),
    ],
)
def test_other_trunks_give_tokens_and_leave_no_parameter_idle(trunk, args):
    tower = build_vision(Vision(trunk=trunk, trunk_args=args, pool="map"), image_size=64, width=32)
    images = torch.randn(2, 3, 64, 64)
    tokens = tower.tokens(images)
    assert tokens.shape[::2] == (2, tower.trunk.num_features)
    tower(images).square().mul(torch.rand(2, 32)).sum().backward()
    assert [name for name, weight in tower.named_parameters() if weight.grad is None] == []


def test_a_feature_map_is_read_row_by_row_whatever_its_memory_order():
    swin = {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
    for trunk, args in [("swin_tiny_patch4_window7_224", swin), ("resnet18", {"layers": [1, 1, 1, 1]})]:
        tower = build_vision(Vision(trunk=trunk, trunk_args=args, pool="mean"), image_size=64, width=32).eval()
        images = torch.randn(1, 3, 64, 64)
        grid = tower.trunk.forward_features(images)
        grid = grid if grid.shape[-1] == tower.trunk.num_features else grid.permute(0, 2, 3, 1)
        assert torch.equal(tower.tokens(images)[0, 1], grid[0, 0, 1])


def test_a_head_only_where_the_widths_differ():
    assert [*build_vision(vit(), 32, 48).head.parameters()] == []
    weight, *bias = build_vision(vit(), 32, 24).head.parameters()
    assert weight.shape == (24, 48)
    assert bias == []


def test_cls_and_mean_pool_the_tokens_they_name():
    images = torch.randn(2, 3, 32, 32)
    for pool in ("cls", "mean"):
        tower = build_vision(vit(pool=pool, trunk_args={"reg_tokens": 2}), 32, 48).eval()
        tokens = tower.trunk.forward_features(images)
        assert tokens.shape == (2, 1 + 2 + 16, 48)  # class, registers, patches
        expected = tokens[:, 0] if pool == "cls" else tokens[:, 3:].mean(dim=1)
        torch.testing.assert_close(tower(images), F.normalize(expected, dim=1))


def test_final_norm_can_be_taken_off():
    torch.manual_seed(0)
    with_norm = build_vision(vit(pool="cls"), 32, 48).eval()
    without = build_vision(vit(pool="cls", final_norm=False), 32, 48).eval()
    without.load_state_dict({k: v for k, v in with_norm.state_dict().items() if not k.startswith("trunk.norm.")})
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(with_norm.trunk.norm(without.tokens(images)), with_norm.tokens(images))
    assert not torch.allclose(without.tokens(images), with_norm.tokens(images))


def test_hidden_width_heads_and_their_defaults():
    assert build_vision(vit(), 32, 48).pool.mlp.fc2.weight.shape == (48, 128)  # 8/3 of the width
    assert build_vision(vit(pool="map"), 32, 48).pool.mlp.fc2.weight.shape == (48, 192)
    for pool in ("nomic", "map"):
        built = build_vision(vit(pool=pool, pool_hidden=77, pool_heads=2), 32, 48).pool
        assert built.mlp.fc2.weight.shape == (48, 77)


def test_bf16_autocast_still_gives_float32_of_unit_length():
    tower = build_vision(vit(), 32, 24)
    with torch.autocast("cpu", torch.bfloat16):
        out = tower(torch.randn(4, 3, 32, 32))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.norm(dim=1), torch.ones(4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_weights_from_a_file(tmp_path, suffix):
    source = build_vision(vit(), 32, 48).trunk.state_dict()
    state = {**source, "head.weight": torch.zeros(10, 48), "head.bias": torch.zeros(10)}  # a classifier is let go
    file = tmp_path / f"trunk{suffix}"
    if suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save({"model": state}, file)
    loaded = build_vision(vit(weights=str(file)), 32, 48).trunk.state_dict()
    assert loaded.keys() == source.keys()
    assert all(torch.equal(loaded[key], source[key]) for key in source)


def test_weights_of_another_size_are_resampled(tmp_path):
    source = build_vision(vit(), 32, 48).trunk
    save_file(source.state_dict(), tmp_path / "trunk.safetensors")
    config = vit(weights=str(tmp_path / "trunk.safetensors"), trunk_args={"patch_size": 16})
    trunk = build_vision(config, 96, 48).trunk
    assert trunk.pos_embed.shape == (1, 37, 48)
    assert trunk.patch_embed.proj.weight.shape == (48, 3, 16, 16)
    assert torch.equal(trunk.pos_embed[:, 0], source.pos_embed[:, 0])  # the class token has no place to resample
    # A smooth resampling keeps the mean of what it resamples.
    torch.testing.assert_close(trunk.pos_embed[:, 1:].mean(1), source.pos_embed[:, 1:].mean(1), rtol=0.2, atol=2e-3)


def test_weights_without_the_last_norm(tmp_path):
    state = build_vision(vit(), 32, 48).trunk.state_dict()
    save_file({k: v for k, v in state.items() if not k.startswith("norm.")}, tmp_path / "trunk.safetensors")
    config = vit(weights=str(tmp_path / "trunk.safetensors"), final_norm=False)
    assert torch.equal(build_vision(config, 32, 48).trunk.cls_token, state["cls_token"])
    with pytest.raises(ConfigError, match=r"missing in the file: norm\.weight, norm\.bias"):
        build_vision(config.model_copy(update={"final_norm": True}), 32, 48)


def test_weights_that_do_not_fit_are_listed(tmp_path):
    state = build_vision(vit(), 32, 48).trunk.state_dict()
    state["blocks.9.norm1.weight"] = state.pop("blocks.1.norm1.weight")
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(ConfigError) as caught:
        build_vision(vit(weights=str(tmp_path / "odd.safetensors")), 32, 48)
    assert "missing in the file: blocks.1.norm1.weight\n" in str(caught.value)
    assert "not in the model: blocks.9.norm1.weight" in str(caught.value)
    with pytest.raises(
        ConfigError, match=r"of another shape: blocks\.0\.attn\.proj\.bias \(48,\) for \(96,\), .* and 25 more"
    ):
        build_vision(vit(weights=str(tmp_path / "odd.safetensors"), trunk_args={"embed_dim": 96}), 32, 48)


class Trap:
    """What a hostile checkpoint would hold."""


def test_weights_files_that_are_refused(tmp_path):
    torch.save({"cls_token": Trap()}, tmp_path / "pickled.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    save_file({"selector.attn.latent": torch.zeros(1, 1, 48)}, tmp_path / "released.safetensors")
    torch.save({"epoch": 3}, tmp_path / "no_tensors.pth")
    for name, message in [
        ("pickled.pt", "not readable as weights"),
        ("cut.safetensors", "not readable as weights"),
        ("released.safetensors", r"not the released layout of nomic-embed-vision\n  missing: embeddings\.cls_token"),
        ("no_tensors.pth", "not a state dict"),
        ("absent.pt", "no such file"),
        ("trunk.npz", r"end in \.safetensors"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build_vision(vit(weights=str(tmp_path / name)), 32, 48)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"trunk": "vit_tny_patch16_224"}, r"no model 'vit_tny_patch16_224'\. Close: .*vit_tiny_patch16_224"),
        ({"trunk_args": {"patchsize": 8}}, r"takes no argument 'patchsize'\. Close: patch_size"),
        ({"trunk_args": {"num_heads": 5}}, "cannot be built with trunk_args"),
        ({"trunk_args": {"patch_size": "8"}}, "cannot be built with trunk_args"),
        ({"trunk_args": {"num_classes": 10}}, "num_classes is set by nev"),
        ({"trunk_args": {"class_token": False}}, "class_token: true"),
        ({"trunk_args": {"class_token": False}, "pool": "cls"}, "use pool map, mean or own"),
        ({"pool_heads": 5}, r"pool_heads \(5\) must divide .* \(48\)"),
        ({"trunk": "vit_tiny_patch16_224.augreg_in22k"}, r"augreg_in21k"),
    ],
)
def test_clear_errors(config, message):
    with pytest.raises(ConfigError, match=message):
        build_vision(vit(**config), 32, 48)


def test_no_last_norm_to_take_off():
    with pytest.raises(ConfigError, match="has no last norm"):
        build_vision(Vision(trunk="resnet18", pool="mean", final_norm=False), 64, 48)


def test_pretrained_without_the_hub_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"could not be fetched .* vision\.weights"):
        build_vision(vit(trunk="vit_tiny_patch16_224.augreg_in21k", pretrained=True), 32, 48)


def test_normalise_is_the_formula():
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    out = normalise(torch.from_numpy(images), mean, std)
    assert out.dtype == torch.float32
    expected = ((images / 255 - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=1e-6)


def test_normalise_refuses_what_is_not_pixels():
    for images in (torch.zeros(2, 5, 7, 3), torch.zeros(2, 3, 5, 7, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"uint8 \[b, H, W, 3\]"):
            normalise(images, (0, 0, 0), (1, 1, 1))

"""nomic-embed-vision-v1.5: the released layout against its arithmetic written out again, and the paper's recipe."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.nomic import VisionSizes, random_released, released_forward, released_shapes

from nev.config.file import load
from nev.config.model import Vision
from nev.models.nomic import from_released, to_released
from nev.models.vision import build_vision

CONFIG = Path(__file__).parents[2] / "configs" / "nomic_embed_vision_v1_5.yaml"
TINY = VisionSizes(hidden=128)


def tiny_tower(ref=4):
    args = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": TINY.heads, "ref_feat_shape": (ref, ref)}
    config = Vision(trunk="eva02_base_patch14_224", trunk_args=args, final_norm=False)
    return build_vision(config, image_size=32, width=48).eval()


@pytest.mark.parametrize("ref", [4, 7])  # the released model has ref == grid; 7 turns the scaling on
def test_the_tower_computes_what_the_released_model_computes(ref):
    released = random_released(TINY, dtype=torch.float64)
    tower = tiny_tower(ref).double()
    tower.load_state_dict(from_released(released))
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = released_forward(released, images, TINY, ref)
    with torch.no_grad():
        # timm keeps sin and cos in float32, so 1e-6 and not 1e-12.
        torch.testing.assert_close(tower.features(images), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(tower(images), F.normalize(expected, dim=1).float(), rtol=0, atol=1e-6)


def test_float32_stays_within_1e_5_of_the_float64_arithmetic():
    released = random_released(TINY)
    tower = tiny_tower()
    tower.load_state_dict(from_released(released))
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    wide = {name: tensor.double() for name, tensor in released.items()}
    expected = released_forward(wide, images.double(), TINY)
    with torch.no_grad():
        torch.testing.assert_close(tower(images).double(), F.normalize(expected, dim=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_the_identity_and_covers_every_parameter(dtype):
    released = random_released(TINY, dtype=dtype)
    ours = from_released(released)
    tower = tiny_tower().to(dtype)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in tower.state_dict().items()}
    assert ours.keys() >= {name for name, _ in tower.named_parameters()}
    back = to_released(ours)
    assert back.keys() == released.keys()
    assert all(torch.equal(back[k], released[k]) and back[k].dtype == dtype for k in released)
    tower.load_state_dict(ours)
    again = from_released(to_released(tower.state_dict()))
    assert all(torch.equal(again[k], v) for k, v in tower.state_dict().items())


def test_other_layouts_are_refused_by_name():
    released = random_released(TINY, dtype=torch.float64)
    odd = {**released, "layers.0.attn.ls1": torch.zeros(1)}
    del odd["selector.norm1.bias"], odd["layers.1.attn.Wqkv.bias"]
    with pytest.raises(ValueError, match=r"not the released layout") as caught:
        from_released(odd)
    assert "missing: selector.norm1.bias, layers.1.attn.Wqkv.bias\n" in str(caught.value)
    assert "unknown: layers.0.attn.ls1" in str(caught.value)
    plain = build_vision(Vision(trunk="vit_tiny_patch16_224", trunk_args={"depth": 1}), 32, 192)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\.weight"):
        to_released(plain.state_dict())


def test_the_recipe_is_the_papers():
    config = load(CONFIG)
    assert config.data.image_size == 224
    assert config.data.augment.scale == (0.9, 1.0)
    assert config.data.augment.ratio == (3 / 4, 4 / 3)
    assert not config.data.augment.flip
    assert config.data.mean == (0.48145466, 0.4578275, 0.40821073)
    assert config.data.std == (0.26862954, 0.26130258, 0.27577711)
    assert config.data.train.startswith("s3://")
    text = config.text
    assert (text.encoder, text.prefix) == ("nomic-ai/nomic-embed-text-v1.5", "search_query: ")
    assert (text.pooling, text.layer_norm, text.max_tokens) == ("mean", True, 77)
    assert not text.trust_remote_code
    vision = config.vision
    assert vision.trunk == "eva02_base_patch14_224.mim_in22k"
    assert vision.trunk_args == {"patch_size": 16, "ref_feat_shape": [14, 14]}
    assert (vision.pretrained, vision.final_norm) == (True, False)
    assert (vision.pool, vision.pool_heads, vision.pool_hidden) == ("nomic", 12, 2048)
    assert config.loss.init_scale == pytest.approx(1 / 0.07, rel=1e-15)
    assert config.loss.learn_scale
    assert config.loss.max_scale is None
    optim = config.optim
    assert (optim.lr, optim.betas, optim.weight_decay, optim.clip_norm) == (1e-3, (0.9, 0.95), 0.0, 1 / 16)
    assert (optim.warmup_steps, optim.schedule, optim.final_lr) == (2000, "cosine", 0.0)
    train = config.train
    assert (train.global_batch, train.epochs, train.precision) == (65_536, 3, "bf16")
    assert train.global_batch // config.workers.count == 4_096
    assert (config.workers.count, config.workers.gpus) == (16, 1)


@pytest.mark.slow
def test_the_recipes_model_at_its_real_size_takes_an_optimiser_step():
    config = load(CONFIG, ["vision.pretrained=false"])
    torch.manual_seed(0)
    tower = build_vision(config.vision, config.data.image_size, width=768)
    assert list(tower.trunk.rope.ref_feat_shape) == [14, 14]
    expected = released_shapes(VisionSizes(dim=768, hidden=2048, depth=12, patch=16, grid=14))
    assert {k: tuple(v.shape) for k, v in to_released(tower.state_dict()).items()} == expected
    assert sum(p.numel() for p in tower.parameters()) == sum(math.prod(shape) for shape in expected.values())

    log_scale = torch.nn.Parameter(torch.tensor(config.loss.init_scale).log())
    weights = [*tower.parameters(), log_scale]
    optim = config.optim
    adamw = torch.optim.AdamW(weights, optim.lr, optim.betas, optim.eps, optim.weight_decay)
    texts, images = F.normalize(torch.randn(2, 768), dim=1), torch.randn(2, 3, 224, 224)
    before = [weight.detach().clone() for weight in weights]
    logits = log_scale.exp() * tower(images) @ texts.T
    target = torch.arange(2)
    ((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2).backward()
    norm = torch.nn.utils.clip_grad_norm_(weights, optim.clip_norm)
    assert torch.isfinite(norm)
    adamw.step()
    for name, old, new in zip([n for n, _ in tower.named_parameters()] + ["log_scale"], before, weights, strict=True):
        assert not torch.equal(old, new), f"{name} did not move"
        assert (old - new).abs().max() <= 1.01 * optim.lr, f"{name} moved further than AdamW's first step can"

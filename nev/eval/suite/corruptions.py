"""Common corruptions at five severities (Hendrycks & Dietterich 2019, arXiv 1903.12261), computed by torchvision and torch.

Eight of the fifteen corruptions can be made with torchvision: noise (Gaussian, shot, impulse), Gaussian blur, and brightness,
contrast, JPEG, pixelate. The strengths are those of ImageNet-C, and of CIFAR-10-C for small pictures, as in the authors' code
(https://github.com/hendrycks/robustness). A picture is corrupted after it was cropped and resized, as in the paper.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from nev.common.imports import import_uninterrupted
from nev.data.decode import Picture

if TYPE_CHECKING:
    import torch

SEVERITIES = (1, 2, 3, 4, 5)
SMALL = 64  # side in pixels, up to which the strengths are those of CIFAR-10-C

# Strengths at severities 1 to 5: (ImageNet-C, CIFAR-10-C).
STRENGTHS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "gaussian_noise": ((0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": ((60, 25, 12, 5, 3), (500, 250, 100, 75, 50)),
    "impulse_noise": ((0.03, 0.06, 0.09, 0.17, 0.27), (0.01, 0.02, 0.03, 0.05, 0.07)),
    "gaussian_blur": ((1, 2, 3, 4, 6), (0.4, 0.6, 0.7, 0.8, 1.0)),
    "brightness": ((0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": ((0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15)),
    "jpeg": ((25, 18, 15, 10, 7), (80, 65, 58, 50, 40)),
    "pixelate": ((0.6, 0.5, 0.4, 0.3, 0.25), (0.95, 0.9, 0.85, 0.75, 0.65)),
}
CORRUPTIONS = tuple(STRENGTHS)


def corrupt(picture: Picture, name: str, severity: int, rng: random.Random) -> Picture:
    """A corrupted copy of a picture: uint8 [S, S, 3] in and out. severity: 1 to 5. rng: source of the noise."""
    import torch

    strength = STRENGTHS[name][len(picture) <= SMALL][severity - 1]
    noise = torch.Generator().manual_seed(int(rng.random() * 2**53))
    pixels = torch.from_numpy(picture).permute(2, 0, 1)
    changed = CHANGES[name](pixels, strength, noise)
    return changed.permute(1, 2, 0).contiguous().numpy()


def _unit(change: Callable[[torch.Tensor, float, torch.Generator], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Make a change of numbers in 0..1 a change of bytes."""

    def change_bytes(pixels: torch.Tensor, strength: float, noise: torch.Generator) -> torch.Tensor:
        changed = change(pixels.float() / 255, strength, noise)
        return (changed.clamp(0, 1) * 255).round().to(pixels.dtype)

    return change_bytes


@_unit
def _gaussian_noise(pixels: torch.Tensor, sigma: float, noise: torch.Generator) -> torch.Tensor:
    import torch

    return pixels + sigma * torch.randn(pixels.shape, generator=noise)


@_unit
def _shot_noise(pixels: torch.Tensor, photons: float, noise: torch.Generator) -> torch.Tensor:
    import torch

    return torch.poisson(pixels * photons, generator=noise) / photons


@_unit
def _impulse_noise(pixels: torch.Tensor, share: float, noise: torch.Generator) -> torch.Tensor:
    """Salt and pepper: `share` of the numbers becomes 0 or 1."""
    import torch

    drawn = torch.rand(pixels.shape, generator=noise)
    return torch.where(drawn < share, (drawn < share / 2).float(), pixels)


@_unit
def _brightness(pixels: torch.Tensor, more: float, noise: torch.Generator) -> torch.Tensor:
    """V of HSV plus a constant: hue and saturation stay, so a colour c becomes c (V + more) / V, and black becomes grey."""
    import torch

    value = pixels.amax(0, keepdim=True)
    wanted = (value + more).clamp(max=1)
    return torch.where(value > 0, pixels * wanted / value.clamp(min=1e-12), wanted)


@_unit
def _contrast(pixels: torch.Tensor, factor: float, noise: torch.Generator) -> torch.Tensor:
    mean = pixels.mean((1, 2), keepdim=True)
    return (pixels - mean) * factor + mean


def _gaussian_blur(pixels: torch.Tensor, sigma: float, noise: torch.Generator) -> torch.Tensor:
    import_uninterrupted("torchvision.transforms.v2.functional")
    from torchvision.transforms.v2 import functional

    changed: torch.Tensor = functional.gaussian_blur(pixels, [2 * round(4 * sigma) + 1] * 2, [sigma, sigma])
    return changed


def _jpeg(pixels: torch.Tensor, quality: float, noise: torch.Generator) -> torch.Tensor:
    import_uninterrupted("torchvision.transforms.v2.functional")
    from torchvision.transforms.v2 import functional

    changed: torch.Tensor = functional.jpeg(pixels, int(quality))
    return changed


def _pixelate(pixels: torch.Tensor, scale: float, noise: torch.Generator) -> torch.Tensor:
    """Shrink by a box filter, enlarge by the nearest pixel."""
    from torch.nn.functional import interpolate

    size = pixels.shape[-1]
    small = interpolate(pixels[None].float(), size=max(1, int(size * scale)), mode="area")
    return interpolate(small, size=size, mode="nearest")[0].round().to(pixels.dtype)


CHANGES: dict[str, Callable[..., torch.Tensor]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "gaussian_blur": _gaussian_blur,
    "brightness": _brightness,
    "contrast": _contrast,
    "jpeg": _jpeg,
    "pixelate": _pixelate,
}

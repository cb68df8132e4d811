"""A loss forward and backward, each in a process of its own: seconds, and how much more memory it took at its peak."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from nev.losses.tiles import TILE_COLUMNS, TILE_ROWS
from nev.ops import onednn

SCALE = 1 / 0.07
GEMM_S = 2.0


class Cost(NamedTuple):
    """seconds of a step; mib: most memory above what the inputs take, in MiB."""

    seconds: float
    mib: float


class LossCost(NamedTuple):
    """seconds of a forward and backward; mib: most memory above what the inputs take, in MiB; gemm_flops: of bare products.

    gemm_flops: FLOP/s, of the same process right before and after; 0 where these were not measured.
    """

    seconds: float
    mib: float
    gemm_flops: float


def pairs(n: int, width: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors, image [n, width] and text likewise, alike by pairs; the log of the scale. float32."""
    generator = torch.Generator(device).manual_seed(0)
    text = normalize(torch.randn(n, width, generator=generator, device=device))
    image = normalize(text + 1.5 * normalize(torch.randn(n, width, generator=generator, device=device)))
    return image.requires_grad_(), text, torch.tensor(math.log(SCALE), requires_grad=True, device=device)


def nev_loss(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
    """nev's loss of a process alone."""
    from nev.losses.contrastive import contrastive_loss

    return contrastive_loss(image, text, log_scale).loss


def open_clip_loss(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
    """open_clip's ClipLoss of a process alone; the text has no gradient here either."""
    from open_clip.loss import ClipLoss

    loss: Tensor = ClipLoss()(image, text, log_scale.exp())
    return loss


LOSSES = {"nev": nev_loss, "open_clip": open_clip_loss}


def cost(name: str, n: int, width: int, products: bool = False) -> LossCost:
    """What one forward and backward over n pairs costs, after a small one. products: time bare products, too."""
    loss = LOSSES[name]
    torch.autograd.backward(loss(*pairs(256, width)))
    inputs = pairs(n, width)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident_mib("VmRSS")
    rates = [gemm_flops(width)] if products else []
    begin = time.perf_counter()
    torch.autograd.backward(loss(*inputs))
    seconds = time.perf_counter() - begin
    mib = resident_mib("VmHWM") - before
    rates += [gemm_flops(width)] if products else []
    return LossCost(seconds, mib, sum(rates) / max(1, len(rates)))


def difference(n: int, width: int) -> float:
    """The largest difference between the two gradients of the images, as a share of the largest gradient."""
    found = []
    for loss in LOSSES.values():
        image, text, log_scale = pairs(n, width)
        found += torch.autograd.grad(loss(image, text, log_scale), image)
    ours, theirs = found
    return float((ours - theirs).abs().max() / theirs.abs().max())


def gemm_flops(width: int) -> float:
    """FLOP/s of a product of a tile's shape, again and again on the same memory: the faster of torch's and oneDNN's."""
    x, text = torch.randn(TILE_ROWS, width), torch.randn(TILE_COLUMNS, width)
    scores = torch.empty(TILE_ROWS, TILE_COLUMNS)
    return max(
        2 * x.numel() * len(text) * _rate(product)
        for product in (lambda: torch.mm(x, text.T, out=scores), lambda: onednn.product(x, text))
    )


def _rate(call: Callable[[], Tensor]) -> float:
    """Calls a second."""
    call()
    begin, done = time.perf_counter(), 0
    while (seconds := time.perf_counter() - begin) < GEMM_S:
        call()
        done += 1
    return done / seconds


def resident_mib(field: str) -> float:
    """A line of /proc/self/status: VmRSS, what is resident now, or VmHWM, its peak. In MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024

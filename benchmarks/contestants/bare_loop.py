"""The limit that a user would compare with: one process, every core, pictures and text vectors already in memory.

The model, the batch, the loss, the optimiser, the clipping and the precision are those of the config. There is no reading,
no decoding, no crop (the pictures are centre views, decoded beforehand by nev's decoder) and no tracking; the flip is done
on the batch where the config flips. Its linear layers are PyTorch's, or nev's (`nev.ops.onednn`) if wanted.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contestants.processes import warm_up_steps
from nev.config.experiment import Experiment


def bare_loop(config: Experiment, steps: int, own_layers: bool, threads: int | None = None) -> float:
    """Train for `steps` steps on the CPU, with nev's linear layers (`own_layers`) or PyTorch's; images/s after the warm-up.

    threads: of torch; None for one a core.
    """
    from nev.models.precision import choose_precision
    from nev.models.vision import build_vision, normalise
    from nev.ops.onednn import Linear1x1

    torch.set_num_threads(threads or os.cpu_count() or 1)
    torch.manual_seed(config.seed)
    batch, warm_up, data = config.train.global_batch, warm_up_steps(steps), config.data
    images, texts = preload(config, steps * batch)
    vision = build_vision(config.vision, data.image_size, texts.shape[1]).train()
    if not own_layers:
        for module in vision.modules():
            if type(module) is Linear1x1:
                module.__class__ = nn.Linear
    log_scale = nn.Parameter(torch.tensor(math.log(config.loss.init_scale)))
    parameters = [*vision.parameters(), log_scale]
    optim = config.optim
    optimizer = torch.optim.AdamW(
        parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )
    precision = choose_precision(config.train.precision, torch.device("cpu"))
    pairs = torch.arange(batch)
    begin = 0.0
    for step in range(steps):
        if step == warm_up:
            begin = time.perf_counter()
        rows = torch.randint(len(images), (batch,))
        pixels = normalise(images[rows], data.mean, data.std)
        if data.augment.flip:
            pixels = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, pixels.flip(-1), pixels)
        with precision.autocast():
            embeddings = vision(pixels)
        logits = log_scale.exp() * embeddings @ texts[rows].T
        loss = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, optim.clip_norm or math.inf)
        optimizer.step()
    return batch * (steps - warm_up) / (time.perf_counter() - begin)


def preload(config: Experiment, wanted: int) -> tuple[Tensor, Tensor]:
    """`wanted` rows of the training set, or all if it has fewer: images uint8 [n, S, S, 3], unit text vectors float32 [n, D].

    One caption a picture. Rows that cannot be decoded are left out.
    """
    from nev.data.block_plan import sequential_blocks
    from nev.data.index import build_index
    from nev.models.text import load_text
    from nev.train.driver.setup import make_reader

    index = build_index(*config.data.only_set("this benchmark"))
    reader = dataclasses.replace(make_reader(config, load_text(config.text), [index]), augment=None)
    images, texts, count = [], [], 0
    for segments in sequential_blocks(reader.index.rows, int(reader.index.rows.max())):  # a row group at a time
        block = reader.read(segments)
        images.append(torch.from_numpy(block["image"][block["valid"]]))
        texts.append(torch.from_numpy(block["text"][block["valid"]]))
        count += len(images[-1])
        if count >= wanted:
            break
    return torch.cat(images), F.normalize(torch.cat(texts).float(), dim=-1)

"""The proof that a tower did not move: what it was, taken before a run, and compared bit for bit after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from numpy.typing import NDArray

from nev.common.errors import NevError, first_few
from nev.config.base import ConfigError
from nev.models.text import TextTower, compute_fingerprint, make_text_encoder, weight_digests

if TYPE_CHECKING:
    from nev.models.text import TextTower


CANARIES = (
    "",
    "a",
    "A photo of a dog.",
    "Two children in red coats chase a brown dog across a snowy field while their parents watch from the porch.",
    "3 blue circles above 12 yellow triangles, 0.5 m apart, in 1969",
    "Ein Fuß überquert die Brücke; 東京の夜景 — ночной город 🌃",
    "ALL CAPS!!! (with, punctuation); and: 'quotes' \"too\"",
    "the quick brown fox jumps over the lazy dog " * 40,
)


class TextMoved(NevError, RuntimeError):
    """The locked text tower is not what it was when the run began."""


@dataclass(frozen=True, eq=False)
class TowerLock:
    """What a tower was: `fingerprint`, `weights` (name -> sha256 of each), `embed_canaries` (float32 [8, width])."""

    fingerprint: str
    weights: dict[str, str]
    canaries: npt.NDArray[np.float32]


def embed_canaries(tower: TextTower) -> npt.NDArray[np.float32]:
    """Embeddings of `CANARIES`, float32 [8, width], in one fixed batch on one CPU thread.

    So the same weights give the same bits throughout a process; another machine or library may give others.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the number of threads changes the order of sums, and the loop may have changed it
    try:
        return tower.encode(CANARIES, batch_size=len(CANARIES))
    finally:
        torch.set_num_threads(threads)


def take_lock(tower: TextTower) -> TowerLock:
    """What the tower is now, from its live weights. Take one before training; give it to `check_locked` after."""
    weights = weight_digests(tower.model)
    return TowerLock(compute_fingerprint(tower, weights), weights, embed_canaries(tower))


def check_locked(tower: TextTower, before: TowerLock) -> None:
    """Raise TextMoved, naming what moved, unless the tower is bit for bit what it was at `before`.

    Checked: every weight, tokenizer and recipe, the canaries' embeddings, eval mode, and that nothing takes gradients.
    """
    now, wrong = take_lock(tower), []
    if tower.model.training:
        wrong.append("it is in training mode")
    if wanting := [name for name, weight in tower.model.named_parameters() if weight.requires_grad]:
        wrong.append(f"{len(wanting)} weights take gradients: {first_few(wanting)}")
    keys = sorted(before.weights.keys() | now.weights.keys())
    if moved := [key for key in keys if before.weights.get(key) != now.weights.get(key)]:
        wrong.append(f"{len(moved)} of {len(keys)} weights changed: {first_few(moved)}")
    elif before.fingerprint != now.fingerprint:
        wrong.append("its tokenizer, prefix, pooling, layer_norm or max_tokens changed")
    if before.canaries.shape != now.canaries.shape:
        wrong.append(f"its embeddings went from {before.canaries.shape} to {now.canaries.shape}")
    elif before.canaries.tobytes() != now.canaries.tobytes():
        rows = [i for i in range(len(CANARIES)) if before.canaries[i].tobytes() != now.canaries[i].tobytes()]
        most = float(np.abs(before.canaries - now.canaries).max())
        wrong.append(f"canary sentences {rows} have other embeddings (by up to {most:.3g})")
    if wrong:
        raise TextMoved(f"the text tower {tower.name!r} is locked, but {'; '.join(wrong)}. This run's model is void.")


SAME = 1e-4  # in any number of a unit vector; float noise is 1e-7


def refuse_other_vectors(tower: TextTower, tokens: Callable[[Sequence[str]], NDArray[np.int32]]) -> None:
    """Raise ConfigError unless the layer, on what `tokens` makes of some sentences, gives what the tower gives of them.

    They differ where an architecture wants more than ids and a mask (segment ids other than 0, padding on the left).
    """

    sentences = [*CANARIES, " ".join(map(str, range(tower.max_tokens)))]  # the last one is cut
    with torch.inference_mode():
        found = make_text_encoder(tower)(torch.from_numpy(tokens(sentences))).numpy()
    distance = float(np.abs(found - tower.encode(sentences)).max())
    if not distance < SAME:
        raise ConfigError(
            f"text.encoder {tower.name!r} cannot run in the training loop: from ids and a mask alone it gives other vectors "
            f"(by up to {distance:.3g}). Use sidecars (text.mode: sidecar, lock: text), or another encoder."
        )

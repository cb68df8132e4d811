"""The proof that a tower did not move: its state is recorded before a run, and compared bit for bit after the run."""

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
from nev.models.digests import weight_digests
from nev.models.text import TextTower, compute_fingerprint, make_text_encoder
from nev.ops.threads import torch_threads

if TYPE_CHECKING:
    from nev.models.frozen import FrozenTrunk
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
    """The locked text tower has changed since the start of the run."""


class TrunkMoved(NevError, RuntimeError):
    """The locked trunk has changed since the start of the run."""


@dataclass(frozen=True, eq=False)
class TowerLock:
    """The state of a tower at one time.

    fingerprint: hash of the weights and the recipe (`compute_fingerprint`).
    weights: sha256 of each tensor, by name.
    canaries: embeddings of `CANARIES`, float32 [8, width].
    """

    fingerprint: str
    weights: dict[str, str]
    canaries: npt.NDArray[np.float32]


def embed_canaries(tower: TextTower) -> npt.NDArray[np.float32]:
    """Embed `CANARIES` in one batch on one CPU thread: float32 [8, width].

    The same weights give the same bits throughout a process. Another machine or another library may give other bits.
    """
    with torch_threads(1):  # training may have changed their number
        return tower.encode(CANARIES, batch_size=len(CANARIES))


def take_lock(tower: TextTower) -> TowerLock:
    """Record the state of the tower before training, for `check_locked` after training."""
    weights = weight_digests(tower.model)
    return TowerLock(compute_fingerprint(tower, weights), weights, embed_canaries(tower))


def check_locked(tower: TextTower, before: TowerLock) -> None:
    """Raise TextMoved, which names the differences, unless the tower equals `before` bit for bit.

    Checked: every weight, the tokenizer and the recipe, the embeddings of the canaries, eval mode, and that no weight requires a
    gradient.
    """
    now, wrong = take_lock(tower), []
    if tower.model.training:
        wrong.append("it is in training mode")
    if trainable := [name for name, weight in tower.model.named_parameters() if weight.requires_grad]:
        wrong.append(f"{len(trainable)} weights require gradients: {first_few(trainable)}")
    keys = sorted(before.weights.keys() | now.weights.keys())
    if moved := [key for key in keys if before.weights.get(key) != now.weights.get(key)]:
        wrong.append(f"{len(moved)} of {len(keys)} weights changed: {first_few(moved)}")
    elif before.fingerprint != now.fingerprint:
        wrong.append("its tokenizer, prefix, pooling, layer_norm or max_tokens changed")
    if before.canaries.shape != now.canaries.shape:
        wrong.append(f"its embeddings went from {before.canaries.shape} to {now.canaries.shape}")
    elif before.canaries.tobytes() != now.canaries.tobytes():
        rows = [i for i in range(len(CANARIES)) if before.canaries[i].tobytes() != now.canaries[i].tobytes()]
        largest = float(np.abs(before.canaries - now.canaries).max())
        wrong.append(f"canary sentences {rows} have other embeddings (by up to {largest:.3g})")
    if wrong:
        raise TextMoved(f"the text tower {tower.name!r} is locked, but {'; '.join(wrong)}. This run's model is void.")


def check_trunk_locked(trunk: FrozenTrunk, fingerprint: str) -> None:
    """Raise TrunkMoved unless the trunk has its fingerprint of before the run, is in eval mode, and requires no gradient."""
    wrong = ["its weights changed"] if trunk.fingerprint != fingerprint else []
    wrong += ["it is in training mode"] if any(module.training for module in trunk.modules()) else []
    wrong += ["it requires gradients"] if any(weight.requires_grad for weight in trunk.parameters()) else []
    if wrong:
        raise TrunkMoved(
            f"the trunk {trunk.config.trunk!r} is locked, but {'; '.join(wrong)}. This run's model is void."
        )


MAX_DIFFERENCE = 1e-4  # of any number of a unit vector; float noise is 1e-7


def refuse_other_vectors(tower: TextTower, tokens: Callable[[Sequence[str]], NDArray[np.int32]]) -> None:
    """Raise ConfigError unless `TextEncoder`, which trains from token ids, embeds some sentences as the tower does.

    tokens: makes token ids of sentences (`nev.data.tokens`).

    The vectors differ where an architecture needs more than ids and a mask (segment ids other than 0, padding on the left).
    """

    sentences = [
        *CANARIES,
        " ".join(map(str, range(tower.max_tokens))),
    ]  # the last sentence is too long and is truncated
    with torch.inference_mode():
        vectors = make_text_encoder(tower)(torch.from_numpy(tokens(sentences))).numpy()
    distance = float(np.abs(vectors - tower.encode(sentences)).max())
    if not distance < MAX_DIFFERENCE:
        raise ConfigError(
            f"text.encoder {tower.name!r} cannot run in the training loop: from ids and a mask alone it gives other vectors "
            f"(by up to {distance:.3g}). Use sidecars (text.mode: sidecar, lock: text), or another encoder."
        )

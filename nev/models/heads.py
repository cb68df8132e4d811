"""Heads: the pooled vector of an image, [b, F] -> the text tower's width, [b, D]."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nev.config.model import Vision


def build_head(config: Vision, features: int, width: int) -> nn.Module:
    """Build the head that `config.head` names, from `features` numbers to `width`.

    Without a name: for a locked trunk `linear`; else a linear layer without bias where the widths differ, nothing where they are
    equal, as nomic-embed-vision-v1.5 has it.
    """
    kind = config.head or ("linear" if config.lock else None)
    if kind == "mlp":
        return MlpHead(features, config.head_hidden or 4 * width, width, config.dropout)
    if kind == "swiglu":
        return SwiGLUHead(features, config.head_hidden or 8 * round(width / 3), width, config.dropout)
    if kind == "linear":
        layer = make_linear(features, width, bias=True)
        return nn.Sequential(nn.Dropout(config.dropout), layer) if config.dropout else layer
    return nn.Identity() if features == width else make_linear(features, width, bias=False)


def make_linear(features: int, width: int, bias: bool) -> nn.Linear:
    """A linear layer that keeps the length of a random vector, about: weights of deviation 1 / sqrt(features), bias 0."""
    layer = nn.Linear(features, width, bias=bias)
    nn.init.normal_(layer.weight, std=features**-0.5)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class MlpHead(nn.Module):
    """fc2(dropout(gelu(fc1(dropout(x)))))."""

    def __init__(self, features: int, hidden: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1 = make_linear(features, hidden, bias=True)
        self.fc2 = make_linear(hidden, width, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """[b, F] -> [b, D]."""
        hidden = F.gelu(self.fc1(F.dropout(x, self.dropout, self.training)))
        vectors: Tensor = self.fc2(F.dropout(hidden, self.dropout, self.training))
        return vectors


class SwiGLUHead(nn.Module):
    """fc2(dropout(silu(gate(y)) * fc1(y))) with y = dropout(x): the gated layer of Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, features: int, hidden: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.gate = make_linear(features, hidden, bias=True)
        self.fc1 = make_linear(features, hidden, bias=True)
        self.fc2 = make_linear(hidden, width, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """[b, F] -> [b, D]."""
        x = F.dropout(x, self.dropout, self.training)
        hidden = F.silu(self.gate(x)) * self.fc1(x)
        vectors: Tensor = self.fc2(F.dropout(hidden, self.dropout, self.training))
        return vectors

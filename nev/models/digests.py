"""Digests of weights."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def weight_digests(model: nn.Module) -> dict[str, str]:
    """sha256 (hex) of each tensor of the state dict (dtype, shape, bytes), by name in sorted order.

    Of a tensor that FSDP has split, this rank's part is hashed.
    """
    digests = {}
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(raw.data)
        digests[name] = digest.hexdigest()
    return digests

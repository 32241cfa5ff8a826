"""What a model or an array in memory is, by content."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def hash_weights(described: str, model: torch.nn.Module) -> str:
    """SHA-256 of a description and of every weight as it is in memory, hexadecimal."""
    digest = hashlib.sha256(described.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_array(array: np.ndarray) -> str:
    """SHA-256 of an array's values, hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()

"""Norms of large tensors, right to rounding on every device."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 2048


def square_sum(values: Tensor) -> Tensor:
    """Sum of squares, a float64 scalar on the tensor's device.

    On a CPU, PyTorch's float32 norm adds up a whole tensor in float32: it is 2e-4 off at 26 M
    elements, more at more, so that the norm would depend on how a grid cuts the tensor. Blocks
    are short enough for float32, and need no float64 copy of the tensor.
    """
    flat = values.detach().reshape(-1)
    cut = flat.numel() // _BLOCK * _BLOCK
    blocks = torch.linalg.vector_norm(flat[:cut].view(-1, _BLOCK), dim=1, dtype=torch.float32)
    rest = torch.linalg.vector_norm(flat[cut:], dtype=torch.float32)
    return blocks.double().square().sum() + rest.double().square()

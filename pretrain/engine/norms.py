"""Norms of large tensors, correct to rounding on every device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_BLOCK = 2048


def square_sum(values: Tensor) -> Tensor:
    """Sum of squares, a float64 scalar on the tensor's device.

    On a CPU, PyTorch's float32 norm adds up a whole tensor in float32. It is off by 2e-4 at 26 M
    elements and by more at larger sizes, so the norm would depend on how a grid splits the tensor.
    Blocks are short enough for float32 sums, and need no float64 copy of the tensor.
    """
    flat = values.detach().reshape(-1)
    cut = flat.numel() // _BLOCK * _BLOCK
    blocks: Tensor = torch.linalg.vector_norm(
        flat[:cut].view(-1, _BLOCK), dim=1, dtype=torch.float32
    )
    rest: Tensor = torch.linalg.vector_norm(flat[cut:], dtype=torch.float32)
    return blocks.double().square().sum() + rest.double().square()


class SquareSum:
    """Sum of squares of many tensors that stay where they are, in few operations.

    The sum is that of `square_sum` over the tensors, to rounding of float64.

    Args:
        tensors: contiguous float32 tensors, whose values may change between calls.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._blocks: list[Tensor] = []
        """``[blocks, 2048]`` views; neighbours in memory are one view."""
        self._rests: list[Tensor] = []
        run: list[Tensor] = []
        for tensor in tensors:
            flat = tensor.detach().view(-1)
            cut = flat.numel() // _BLOCK * _BLOCK
            if cut < flat.numel():
                self._rests.append(flat[cut:])
            if run and not _follows(flat, run[-1]):
                self._add(run)
            if cut:
                run.append(flat[:cut])
        self._add(run)

    def _add(self, run: list[Tensor]) -> None:
        if run:
            count = sum(view.numel() for view in run)
            self._blocks.append(run[0].as_strided((count // _BLOCK, _BLOCK), (_BLOCK, 1)))
            run.clear()

    def __call__(self) -> Tensor:
        """The sum now, a float64 scalar on the tensors' device."""
        norms = [torch.linalg.vector_norm(block, dim=1) for block in self._blocks]
        if self._rests:
            norms.append(torch.stack(torch._foreach_norm(self._rests)))
        return torch.cat(norms).double().square().sum()


def _follows(tensor: Tensor, previous: Tensor) -> bool:
    """Whether a tensor begins where another ends, in the same storage."""
    same_storage = tensor.untyped_storage().data_ptr() == previous.untyped_storage().data_ptr()
    return (
        same_storage
        and tensor.data_ptr() == previous.data_ptr() + previous.numel() * previous.element_size()
    )

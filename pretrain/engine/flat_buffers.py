"""Flat buffers of parameters, gradients and fp32 masters, divided among data-parallel processes.

The parameters of a buffer are views of one tensor, so that each operation of an update on all of
them (casts, norms, clipping, reductions) is one operation on one tensor. The gradient has memory
only from the backward pass to the end of the update: it comes while the activations go.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from models.roles import info_of

_ALIGNMENT = 8
"""Number of elements; each process's part of a buffer is a multiple of it."""
SMALLEST = 1 << 20
"""Number of gradient elements that are worth a separate reduction."""


@dataclass(frozen=True)
class OwnedPiece:
    """The part of one parameter that this process owns: elements of a master, and their place."""

    parameter: nn.Parameter
    offset: int
    """First element, in the flattened parameter."""
    start: int
    """First element, in the owner."""
    count: int


@dataclass
class Owner:
    """Contiguous masters of this process that one param group updates."""

    tensor: Tensor
    """1-D float32, empty if this process has none; its ``grad`` is a view of the buffer's."""
    parameters: list[nn.Parameter]
    """All parameters in it on any process."""
    pieces: list[OwnedPiece] = field(default_factory=list)


class FlatBuffer:
    """Some parameters in one tensor.

    Args:
        members: (param group name, parameters) in the order of the buffer.
        precision: of the working weights.
        parts, part: the number of parts of the masters, and the index of this process's part.
    """

    def __init__(
        self,
        members: Sequence[tuple[str, list[nn.Parameter]]],
        precision: torch.dtype,
        parts: int,
        part: int,
    ) -> None:
        self.parameters = [parameter for _, parameters in members for parameter in parameters]
        device = self.parameters[0].device
        unit = parts * _ALIGNMENT if parts > 1 else 1
        size = -(-sum(parameter.numel() for parameter in self.parameters) // unit) * unit
        self.working = torch.zeros(size, dtype=precision, device=device)
        self.gradient = torch.zeros(size, dtype=torch.float32, device=device)
        self._starts: dict[int, int] = {}
        self.views: dict[int, Tensor] = {}
        """Views of the gradient, by ``id`` of the parameter, in its shape."""
        self._lay_out()
        width = size // parts
        self.low, self.high = part * width, (part + 1) * width
        self.own_working = self.working[self.low : self.high]
        self.own_gradient = self.gradient[self.low : self.high]
        # In float32 the working weights are the masters.
        self.master = self.own_working.float()
        self.owners = {name: self._owner(parameters) for name, parameters in members}

    @torch.no_grad()
    def _lay_out(self) -> None:
        start = 0
        for parameter in self.parameters:
            stop = start + parameter.numel()
            place = self.working[start:stop].view_as(parameter)
            place.copy_(parameter.data)
            parameter.data = place
            self._starts[id(parameter)] = start
            self.views[id(parameter)] = self.gradient[start:stop].view_as(parameter)
            start = stop
        self._used = start
        """Number of elements that are not padding."""

    def _owner(self, parameters: list[nn.Parameter]) -> Owner:
        first = self._starts[id(parameters[0])]
        last = self._starts[id(parameters[-1])] + parameters[-1].numel()
        low = min(max(first, self.low), self.high)
        high = max(min(last, self.high), low)
        tensor = self.master[low - self.low : high - self.low].detach()
        tensor.grad = self.own_gradient[low - self.low : high - self.low]
        owner = Owner(tensor, parameters)
        for parameter in parameters:
            start = self._starts[id(parameter)]
            begin, end = max(start, low), min(start + parameter.numel(), high)
            if end > begin:
                owner.pieces.append(OwnedPiece(parameter, begin - start, begin - low, end - begin))
        return owner

    def own_gradients(self, counted: set[int]) -> list[Tensor]:
        """This process's gradients of the parameters with ``id`` in ``counted``, as 1-D views."""
        return [
            self.own_gradient.narrow(0, place + piece.start, piece.count)
            for owner in self.owners.values()
            for place in (owner.tensor.storage_offset() - self.master.storage_offset(),)
            for piece in owner.pieces
            if id(piece.parameter) in counted
        ]

    def has_gradient(self) -> bool:
        """Whether there is memory for the gradient."""
        return self.gradient.untyped_storage().nbytes() > 0

    def allocate_gradient(self) -> None:
        """Give the gradient memory, whose elements may have any value; its views have it too."""
        storage = self.gradient.untyped_storage()
        storage.resize_(self.gradient.numel() * self.gradient.element_size())
        self.gradient[self._used :].zero_()

    def free_gradient(self) -> None:
        """Give the memory of the gradient back; its views stay, without elements."""
        self.gradient.untyped_storage().resize_(0)

    @property
    def is_rounded(self) -> bool:
        """Whether the working weights are not the masters but their values in fewer bits."""
        return self.working.dtype != torch.float32


def in_buckets(
    parameters: Iterable[nn.Parameter], smallest: int = SMALLEST
) -> list[list[nn.Parameter]]:
    """Parameters in their order, split between layers into parts of at least ``smallest``
    elements."""
    buckets: list[list[nn.Parameter]] = []
    current: list[nn.Parameter] = []
    for _, layer in groupby(parameters, lambda parameter: info_of(parameter).layer):
        current = current + list(layer)
        if sum(parameter.numel() for parameter in current) >= smallest:
            buckets.append(current)
            current = []
    if current:
        buckets.append(current)
    return buckets


def by_group(
    parameters: Iterable[nn.Parameter], groups: list[dict[str, Any]]
) -> list[tuple[str, list[nn.Parameter]]]:
    """Parameters by param group, in the order of the groups, without empty groups."""
    identities = {id(parameter) for parameter in parameters}
    named_members = []
    for group in groups:
        members = [parameter for parameter in group["params"] if id(parameter) in identities]
        if members:
            named_members.append((group["name"], members))
    return named_members

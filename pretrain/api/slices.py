"""λ of the rows of a fused matrix, of which a process may hold only a part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.live import LiveParameter, is_sharded
from pretrain.errors import UsageError


def local_part(parameter: Tensor) -> Tensor:
    """The part of a parameter that this process holds."""
    if is_sharded(parameter):
        part: Tensor = parameter.to_local()  # type: ignore[attr-defined]
        return part
    return parameter


class Rows:
    """λ of each output of the local part of a fused matrix, shaped to multiply it."""

    def __init__(self, decays: Tensor, dtype: torch.dtype) -> None:
        self._decays, self._dtype = decays, dtype
        self._factor: Tensor | None = None

    def factor(self, rate: Any) -> Tensor:
        """1 − rate·λ; computed once a step, because layers share it."""
        if self._factor is None:
            self._factor = (1.0 - rate * self._decays).to(self._dtype)
        return self._factor

    def forget(self) -> None:
        """The next step has another rate."""
        self._factor = None


def rows_of(one: LiveParameter, decays: tuple[float, ...]) -> Rows:
    """λ of the local outputs of a fused matrix, by the role of each.

    Raises:
        UsageError: if the parameter is divided in a way that is not understood.
    """
    assert one.part is not None
    parameter = one.parameter
    # float64, so that a whole matrix of one λ gets the bits of the optimizer's own decay
    precise = torch.float32 if parameter.device.type == "mps" else torch.float64
    whole = torch.tensor(decays, dtype=precise)[one.part].to(parameter.device)
    part = _own_part(whole, parameter, one.dim) if is_sharded(parameter) else whole
    shape = [1] * parameter.dim()
    shape[one.dim] = len(part)
    # a factor in bf16 would be 1 for every usual rate
    return Rows(part.view(shape), torch.promote_types(parameter.dtype, torch.float32))


def _own_part(whole: Tensor, parameter: Any, dim: int) -> Tensor:
    """The entries of a vector that belong to this process's part of a sharded matrix.

    The vector is divided as dimension ``dim`` of the matrix is, by the same code of torch.
    """
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    places: list[Any] = []
    for place in parameter.placements:
        if type(place) not in (Shard, Replicate):
            raise UsageError(
                f"a fused matrix is divided as {place}, in which its query, key and value are not "
                "found; use fully_shard alone, or the same decay for the three"
            )
        own = type(place) is Shard and place.dim == dim
        places.append(Shard(0) if own else Replicate())
    divided = distribute_tensor(whole, parameter.device_mesh, places, src_data_rank=None)
    part: Tensor = divided.to_local()
    return part

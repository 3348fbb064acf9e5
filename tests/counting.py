"""Counts what this process sends in collectives, by their kind, wherever they are called."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

_SHARE = {
    "allreduce_": 2.0, "allgather_": 1.0, "_allgather_base_": 1.0, "_reduce_scatter_base_": 1.0,
    "all_gather_into_tensor": 1.0, "reduce_scatter_tensor": 1.0, "broadcast_": 1.0,
}  # fmt: skip
"""Times (n - 1)/n of the whole tensor that a rank of a ring sends (Thakur et al. 2005)."""
_SILENT = ("recv_", "barrier", "monitored_barrier_", "wait_tensor")


class Counting(TorchDispatchMode):
    """While it is on, adds up the bytes that this rank sends of collectives, as rings send them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: dict[str, float] = defaultdict(float)
        """By operation and width of an element: ``allreduce_/4``."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space in ("c10d", "_c10d_functional") and name not in _SILENT:
            tensors = _tensors(args)
            self.bytes[f"{name}/{tensors[0].element_size()}"] += _sent(name, args, _size(args))
        return func(*args, **(kwargs or {}))


def _sent(name: str, args: tuple[Any, ...], size: int) -> float:
    # Of what goes in and what comes out, the larger is the whole tensor.
    whole = max(sum(t.numel() * t.element_size() for t in _tensors(one)) for one in args)
    if name == "send":
        return float(whole)
    if name == "all_gather_into_tensor":  # is given its own part alone
        whole *= size
    return _SHARE[name] * (size - 1) / size * whole


def _size(args: tuple[Any, ...]) -> int:
    """Ranks of the group among the arguments."""
    for one in args:
        if isinstance(one, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(one).size()
            except RuntimeError:  # another object, such as the operator of a reduction
                continue
        if isinstance(one, str) and one not in ("sum", "avg", "max"):
            return dist.distributed_c10d._resolve_process_group(one).size()  # type: ignore[arg-type, attr-defined]
    raise AssertionError(f"no group among {args}")


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [one for part in value for one in _tensors(part)]
    return []

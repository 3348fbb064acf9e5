"""Where DeepSpeed keeps the fp32 master weights: one view of every ZeRO stage.

Checkpoints, rank statistics and the audit of λ all need to know which elements of which parameter
this process's optimizer owns, and in which group. Each stage keeps this in different private
structures; only this module knows them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models.roles import ParameterInfo, info_of
from pretrain.engine.flat_update import FlatUpdate

_PART = 1 << 24
"""Number of elements."""


@dataclass(frozen=True)
class Fragment:
    """Contiguous elements of one parameter that this process's optimizer holds."""

    parameter: nn.Parameter
    offset: int
    """First element, in the flattened local (tensor-parallel) shard."""
    master: torch.Tensor
    """1-D view of the fp32 master: writing to it changes what the optimizer updates."""
    group: dict[str, Any]
    """The optimizer's own param group (learning rate, λ, name)."""
    optimizer: torch.optim.Optimizer
    owner: torch.Tensor
    """The tensor under which the optimizer keeps its state (flat under ZeRO)."""
    start: int
    """Where ``master`` begins inside ``owner``."""

    @property
    def info(self) -> ParameterInfo:
        """Name, role and shape of the parameter."""
        return info_of(self.parameter)

    def parts(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Views of consecutive parts of the master, none larger than a host copies at a time.

        Yields:
            (first element, in the flattened local shard; the view).
        """
        for start in range(0, self.master.numel(), _PART):
            yield self.offset + start, self.master[start : start + _PART]

    def moments(self) -> dict[str, torch.Tensor]:
        """1-D views of the optimizer's state for these elements; empty before the first step."""
        state = self.optimizer.state.get(self.owner, {})
        return {
            key: value.view(-1).narrow(0, self.start, self.master.numel())
            for key, value in state.items()
            if torch.is_tensor(value) and value.numel() == self.owner.numel() and value.dim() > 0
        }


def fragments(engine: Any) -> list[Fragment]:
    """This process's fragments of a DeepSpeed engine, in a fixed order, without empty ones."""
    if isinstance(engine, FlatUpdate):
        return list(_flat(engine))
    fragments_of = (_plain, _zero12, _zero12, _zero3)[engine.zero_optimization_stage()]
    return list(fragments_of(engine.optimizer))


def tensors_of(engine: Any) -> dict[int, list[nn.Parameter]]:
    """The parameters in each tensor that the optimizer updates, by the tensor's ``id``.

    The lists are the same on every process of a stage, even if a process's piece lacks a parameter.
    """
    if isinstance(engine, FlatUpdate):
        return {id(owner.tensor): owner.parameters for owner in engine.owners}
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        return {id(p): [p] for group in optimizer.param_groups for p in group["params"]}
    if stage == 3:
        pairs = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
    else:
        pairs = zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True)
    return {id(flat): list(parameters) for flat, parameters in pairs}


def is_replicated(engine: Any) -> bool:
    """Whether every data-parallel process holds all masters (no ZeRO)."""
    if isinstance(engine, FlatUpdate):
        return not engine.shared
    return isinstance(engine.optimizer, torch.optim.Optimizer)


def is_tied_copy(parameter: nn.Parameter) -> bool:
    """Whether another pipeline stage holds the same tied weight, and counts and saves it."""
    return bool(getattr(parameter, "ds_pipe_replicated", False))


def norm_in_step(engine: Any) -> float:
    """Global norm of the gradient before clipping, during the optimizer's step."""
    if isinstance(engine, FlatUpdate):
        return float(engine.gradient_norm)
    holder = engine if is_replicated(engine) else engine.optimizer
    return float(holder._global_grad_norm)


def _flat(update: FlatUpdate) -> Iterator[Fragment]:
    for group, owner in update.owner_groups():
        for piece in owner.pieces:
            yield Fragment(
                piece.parameter,
                piece.offset,
                owner.tensor.narrow(0, piece.start, piece.count),
                group,
                update.optimizer,
                owner.tensor,
                piece.start,
            )


def _plain(optimizer: torch.optim.Optimizer) -> Iterator[Fragment]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield Fragment(parameter, 0, parameter.data.view(-1), group, optimizer, parameter, 0)


def _zero12(zero: Any) -> Iterator[Fragment]:
    groups = zero.optimizer.param_groups
    for group, parameters, flat in zip(
        groups, zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True
    ):
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is not None:
                yield Fragment(
                    parameter,
                    mapping.lp_fragment_address.start,
                    mapping.hp_fragment.detach(),
                    group,
                    zero.optimizer,
                    flat,
                    mapping.hp_fragment_address.start,
                )


def _zero3(zero: Any) -> Iterator[Fragment]:
    for index, parameters in enumerate(zero.fp16_groups):
        group = zero.optimizer.param_groups[zero.sub_group_to_group_id[index]]
        flat = zero.fp32_partitioned_groups_flat[index]
        for parameter in parameters:
            _, start, width = zero.grad_position[zero.get_param_id(parameter)]
            offset = _rank3(parameter) * width
            count = min(width, parameter.ds_numel - offset)
            if count > 0:
                master = flat.detach().narrow(0, start, count)
                yield Fragment(parameter, offset, master, group, zero.optimizer, flat, start)


def _rank3(parameter: Any) -> int:
    """This process's index among the processes over which ZeRO-3 splits ``parameter``."""
    return int(torch.distributed.get_rank(parameter.ds_process_group))


def local_shape(parameter: Any) -> torch.Size:
    """Shape of the local (tensor-parallel) shard, even if ZeRO-3 has freed the values."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def refresh_working(engine: Any) -> None:
    """Set the working weights of all processes from the masters; a collective call."""
    if isinstance(engine, FlatUpdate):
        engine.refresh()
    elif engine.zero_optimization_stage() in (1, 2):
        engine.optimizer.update_lp_params()
    elif engine.zero_optimization_stage() == 3:
        for fragment in fragments(engine):
            parameter: Any = fragment.parameter
            part = parameter.ds_tensor.data.view(-1)
            part[: fragment.master.numel()].copy_(fragment.master)
        for parameter in engine.module.parameters():
            _gather_kept(parameter)


def _gather_kept(parameter: Any) -> None:
    """Gather a parameter that ZeRO 3 keeps whole between uses, because it is small."""
    if parameter.data.numel() != parameter.ds_numel:
        return
    group = parameter.ds_process_group
    part = parameter.ds_tensor.data.view(-1).to(parameter.device)
    whole = part.new_empty(part.numel() * torch.distributed.get_world_size(group))
    torch.distributed.all_gather_into_tensor(whole, part, group=group)
    parameter.data.view(-1).copy_(whole[: parameter.ds_numel])


def prepare_moments(fragment: Fragment, keys: tuple[str, ...], step: float) -> None:
    """Create zero optimizer state, as after ``step`` updates, if there is none yet."""
    state = fragment.optimizer.state[fragment.owner]
    for key in keys:
        if key not in state:
            state[key] = torch.zeros_like(fragment.owner)
    state["step"] = torch.tensor(float(step), dtype=torch.float32)
    if fragment.group.get("fused") or fragment.group.get("capturable"):
        state["step"] = state["step"].to(fragment.owner.device)

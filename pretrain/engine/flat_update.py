"""The update of ZeRO 0 and 1 on flat buffers, in a few operations for each group of parameters.

No hook does work for a single parameter. When the gradients of a bucket of layers are complete, one
operation packs them into a flat float32 buffer, in which micro batches are summed. With the last
micro batch, the reduction over data-parallel processes starts while the backward pass continues.
Then there is one norm, one clipping, one optimizer step for each param group, and one cast back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.roles import declared_parameters, info_of
from pretrain.distributed.grid import Grid
from pretrain.engine.flat_buffers import SMALLEST, FlatBuffer, Owner, by_group, in_buckets
from pretrain.engine.norms import SquareSum

Groups = list[dict[str, Any]]


class FlatUpdate:
    """A model and its optimizer; the calls are those of a DeepSpeed engine.

    Args:
        module: the model; its parameters become views of flat buffers.
        groups: param groups, each with ``name`` and ``params``.
        build: makes the optimizer of such groups; their ``params`` are this process's flat masters.
        precision: of the working weights and activations; masters and gradients are float32.
        shared: data-parallel processes divide the masters (ZeRO 1); otherwise each holds all.
        micro_batches: number of micro batches per update.
        clipping: the largest norm of the gradient; 0 for none.
        smallest: least number of elements of a bucket.
    """

    def __init__(
        self,
        module: nn.Module,
        grid: Grid,
        groups: Groups,
        build: Callable[[Groups], torch.optim.Optimizer],
        precision: torch.dtype,
        shared: bool,
        micro_batches: int,
        clipping: float,
        smallest: int = SMALLEST,
    ) -> None:
        self.module = module.to(precision)
        self.shared = shared and grid.data > 1
        self._grid, self._count, self._clipping = grid, micro_batches, clipping
        buckets = in_buckets(declared_parameters(module), smallest)
        parts, part = (grid.data, grid.data_rank) if self.shared else (1, 0)
        self.buffers = [
            FlatBuffer(by_group(bucket, groups), precision, parts, part) for bucket in buckets
        ]
        self.owners = [owner for buffer in self.buffers for owner in buffer.owners.values()]
        self._buckets = [
            _Bucket(bucket, buffer, self._complete)
            for bucket, buffer in zip(buckets, self.buffers, strict=True)
        ]
        counted = self._counted()
        gradients = [
            gradient for buffer in self.buffers for gradient in buffer.own_gradients(counted)
        ]
        self._square_sum = SquareSum(gradients) if gradients else None
        self._free_gradients()
        self.optimizer = build(
            [{**group, "params": self._owned(group["name"])} for group in groups]
        )
        self.decides_on_device = False
        """Skip an update that is not finite without waiting for the device (`gate`)."""
        self.keeps_gradients = False
        """Keep the memory of the gradients between updates."""
        self.micro_batches_done = 0
        """Number of micro batches of the current update so far."""
        self._reductions: list[Any] = []
        self._packed: set[int] = set()
        """``id`` of the buckets of the last micro batch that are packed."""
        self._waiting: list[_Bucket] = []
        """Buckets to reduce; the last one, which the backward pass completes first, is next."""
        self.gradient_norm = torch.zeros((), device=grid.device)
        """Global norm of the last gradient before clipping; infinite or NaN if it is not finite."""

    def _owned(self, name: str) -> list[Tensor]:
        """This process's masters of a param group."""
        return [buffer.owners[name].tensor for buffer in self.buffers if name in buffer.owners]

    def _counted(self) -> set[int]:
        """``id`` of the parameters that this process counts in the global norm, each element
        once."""
        grid = self._grid
        if not self.shared and grid.data_rank:  # the others hold the same
            return set()
        return {
            id(parameter)
            for parameter in declared_parameters(self.module)
            if info_of(parameter).partition_dim is not None or grid.tensor_rank == 0
        }

    def __call__(self, *arguments: Any) -> Any:
        """The model's forward pass."""
        return self.module(*arguments)

    def begin(self) -> None:
        """Begin an update; micro batches of one that an exception ended do not count."""
        self.micro_batches_done = 0
        self._wait_for_reductions()
        self._packed.clear()
        self._waiting = list(self._buckets)

    @property
    def is_at_first(self) -> bool:
        """Whether the next micro batch is the first of its update, which sets the gradients."""
        return self.micro_batches_done == 0

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro batch."""
        self.micro_batches_done += 1
        for bucket in self._buckets:
            bucket.begin()
        (loss if self._count == 1 else loss / self._count).backward()
        for bucket in self._buckets:
            if not bucket.is_complete:  # a parameter on which the loss does not depend
                bucket.finish()
                self._complete(bucket)

    def _complete(self, bucket: _Bucket) -> None:
        """Pack the complete gradients of a bucket, and reduce them in the last micro batch."""
        bucket.pack(first=self.micro_batches_done == 1)
        if self._grid.data == 1 or self.micro_batches_done < self._count:
            return
        self._packed.add(id(bucket))
        # In one order on every process, even if gradients arrive in another one.
        while self._waiting and id(self._waiting[-1]) in self._packed:
            self._reduce(self._waiting.pop())

    def _reduce(self, bucket: _Bucket) -> None:
        buffer = bucket.buffer
        group = self._grid.data_group
        buffer.gradient.div_(self._grid.data)
        self._reductions.append(
            dist.reduce_scatter_tensor(
                buffer.own_gradient, buffer.gradient, group=group, async_op=True
            )
            if self.shared
            else dist.all_reduce(buffer.gradient, group=group, async_op=True)
        )

    @torch.no_grad()
    def step(self) -> None:
        """Update the weights after the last micro batch; a gradient that is not finite changes
        nothing."""
        if self.micro_batches_done < self._count:
            return
        for bucket in self._buckets:
            bucket.require_gradient()
        try:
            self._step()
        finally:
            if not self.keeps_gradients:
                self._free_gradients()

    def _free_gradients(self) -> None:
        for buffer in self.buffers:
            buffer.free_gradient()

    def _step(self) -> None:
        self._wait_for_reductions()
        self.gradient_norm = self._norm()
        if self.decides_on_device:
            # The attributes that torch.amp.GradScaler sets: fused optimizers read them.
            # Only 0 · finite is 0: fewer operations than `isfinite`.
            self.optimizer.found_inf = (self.gradient_norm * 0.0).ne(0.0).float()  # type: ignore[attr-defined]
        elif not bool(self.gradient_norm.isfinite()):
            return
        if self._clipping:
            self._clip()
        self.optimizer.step()
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Set the working weights of all processes from the masters; a collective call."""
        stale = [buffer for buffer in self.buffers if buffer.is_rounded]
        if stale:
            torch._foreach_copy_(
                [buffer.own_working for buffer in stale], [buffer.master for buffer in stale]
            )
        if self.shared:
            self._gather()

    def _clip(self) -> None:
        excess = ((self.gradient_norm + 1e-6) / self._clipping).clamp_min(1.0)
        if self.decides_on_device and excess.is_cuda:
            self.optimizer.grad_scale = excess  # type: ignore[attr-defined]
        else:  # on a CPU too, where old runs continue with the same bits
            torch._foreach_mul_([buffer.own_gradient for buffer in self.buffers], 1.0 / excess)

    def _wait_for_reductions(self) -> None:
        for reduction in self._reductions:
            reduction.wait()
        self._reductions.clear()

    def _norm(self) -> Tensor:
        if self._square_sum is None:  # other processes count everything
            total = torch.zeros((), dtype=torch.float64, device=self._grid.device)
        else:
            total = self._square_sum()
        if self._grid.world_size > 1:
            dist.all_reduce(total)
        return total.sqrt().float()

    def _gather(self) -> None:
        group = self._grid.data_group
        pending = [
            dist.all_gather_into_tensor(
                buffer.working, buffer.own_working, group=group, async_op=True
            )
            for buffer in self.buffers
        ]
        for gathering in pending:
            gathering.wait()

    def get_global_grad_norm(self) -> Tensor:
        """Norm of the last update's gradient over the whole model, before clipping."""
        return self.gradient_norm

    def owner_groups(self) -> list[tuple[dict[str, Any], Owner]]:
        """Each owner with its param group in the optimizer."""
        group_of = {
            id(tensor): group for group in self.optimizer.param_groups for tensor in group["params"]
        }
        return [(group_of[id(owner.tensor)], owner) for owner in self.owners]

    def destroy(self) -> None:
        """Remove the hooks."""
        for bucket in self._buckets:
            bucket.remove()


class _Bucket:
    """Parameters whose gradients are packed, and reduced, together.

    Args:
        buffer: the flat buffer that the bucket fills.
        complete: called when the last gradient of a backward pass has arrived.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        buffer: FlatBuffer,
        complete: Callable[[_Bucket], None],
    ) -> None:
        self.buffer = buffer
        self._parameters = parameters
        self._views = [buffer.views[id(parameter)] for parameter in parameters]
        self._missing = 0
        self._report = complete
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._arrived) for parameter in parameters
        ]

    def begin(self) -> None:
        """Prepare for a backward pass."""
        self._missing = len(self._parameters)
        for parameter in self._parameters:
            parameter.grad = None  # so that autograd passes its tensors on and adds nothing

    @property
    def is_complete(self) -> bool:
        """Whether every gradient of this backward pass has arrived."""
        return self._missing == 0

    def _arrived(self, _: Tensor) -> None:
        self._missing -= 1
        if self._missing == 0:
            self._report(self)

    def finish(self) -> None:
        """Treat missing gradients as zero."""
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._missing = 0

    @torch.no_grad()
    def pack(self, first: bool) -> None:
        """Set or add the gradients in the buffer, and release them."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if first:
            if not self.buffer.has_gradient():
                self.buffer.allocate_gradient()
            torch._foreach_copy_(self._views, gradients)
        else:
            self.require_gradient()
            torch._foreach_add_(self._views, gradients)
        for parameter in self._parameters:
            parameter.grad = None

    def require_gradient(self) -> None:
        """Refuse to touch a gradient without memory: PyTorch would end the process.

        Raises:
            RuntimeError: if there was no first micro batch since the last update.
        """
        if not self.buffer.has_gradient():
            raise RuntimeError("the update has no gradients: call begin() before each update")

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

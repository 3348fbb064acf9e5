"""From the last hidden states to the cross-entropy, without ever holding all logits.

The logits of a batch are by far its largest tensor (tokens x vocabulary, in float32 for the
softmax). They are computed for a block of tokens at a time, turned into their own gradient in
place, and multiplied back at once, so that none are kept for the backward pass. For a vocabulary
that tensor parallelism splits, the steps are those of Megatron-core.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from models.kernels import DEFAULT_KERNELS, Kernels, compiled
from models.parallel import TensorParallel, enter, megatron_module

_LEAST_ROWS = 256


@dataclass(frozen=True)
class Projection:
    """Logits that are not computed yet: hidden states, and the matrix that maps them to logits."""

    hidden: Tensor
    """``[sequence, batch, hidden]``; under sequence parallelism this process's part."""
    weight: Tensor
    """``[padded vocabulary / tensor_parallel, hidden]``."""
    bias: Tensor | None = None
    """-inf on padding, if this process has any."""
    tp: TensorParallel = TensorParallel()
    kernels: Kernels = DEFAULT_KERNELS
    softcap: float = 0.0
    """c of c · tanh(logit / c); 0: logits are not bounded."""

    def logits(self) -> Tensor:
        """``[sequence, batch, padded vocabulary / tensor_parallel]``."""
        return self.of(enter(self.hidden, self.tp), self.weight)[0]

    def of(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of some hidden states, and their derivative by the unbounded ones, unless it is
        1."""
        if not self.softcap:
            return F.linear(hidden, weight, self.bias), None
        bounded = torch.tanh(F.linear(hidden, weight).float() / self.softcap)
        logits = (self.softcap * bounded).to(weight.dtype)
        slope = (1 - bounded.square()).to(weight.dtype)
        return (logits if self.bias is None else logits + self.bias), slope

    def rows(self, tokens: int) -> int:
        """Number of tokens whose logits the loss computes at once, in parts of about one size; too
        few make slow matrix products."""
        most = max(_LEAST_ROWS, self.kernels.loss_bytes // (4 * self.weight.shape[0]))
        parts = -(-tokens // most)
        return -(-tokens // parts)


def mean_loss(
    projection: Projection, labels: Tensor, partial_labels: bool = False, z_loss: float = 0.0
) -> Tensor:
    """Mean cross-entropy, in nats per token; its gradient is computed in the forward pass.

    Args:
        labels: ``[batch, sequence]`` integers.
        partial_labels: labels below 0 do not count; every micro batch has the same number of them.
        z_loss: the gradient is that of the cross-entropy plus this times the mean of log² Z, where
            Z is the normaliser of the softmax; the returned value has no such term.
    """
    targets = labels.t().flatten()
    has_label = None
    if partial_labels:
        has_label, targets = targets >= 0, targets.clamp_min(0)
    hidden = enter(projection.hidden, projection.tp).flatten(0, 1)
    loss: Tensor = _MeanCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, projection.weight, targets, has_label, projection, z_loss
    )
    return loss


@torch.no_grad()
def token_losses(projection: Projection, targets: Tensor) -> Tensor:
    """Cross-entropy of every token, in nats, without gradient.

    Args:
        targets: ``[sequence, batch]`` integers; any valid token where the loss is not needed.

    Returns:
        ``[sequence, batch]`` float32, equal on every process of the tensor-parallel group.
    """
    hidden = enter(projection.hidden, projection.tp).flatten(0, 1)
    flat, rows = targets.flatten(), projection.rows(targets.numel())
    parts = []
    for start in range(0, len(flat), rows):
        part = slice(start, start + rows)
        logits, _ = projection.of(hidden[part], projection.weight)
        parts.append(_CrossEntropy(logits, flat[part], projection.tp).losses)
    return torch.cat(parts).view_as(targets)


class _CrossEntropy:
    """Cross-entropy of a block of tokens; overwrites the logits if they are float32."""

    def __init__(self, logits: Tensor, targets: Tensor, tp: TensorParallel) -> None:
        self._steps = megatron_module("cross_entropy").VocabParallelCrossEntropy

        def reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType) -> None:
            if tp.size > 1:
                dist.all_reduce(tensor, op=op, group=tp.group)

        logits, largest = self._steps.calculate_logits_max(logits)
        reduce(largest, dist.ReduceOp.MAX)
        width = logits.shape[-1]
        self._mask, self._targets, predicted, total, exponentials = (
            self._steps.calculate_predicted_logits(
                logits, targets, largest, tp.rank * width, (tp.rank + 1) * width
            )
        )
        reduce(predicted, dist.ReduceOp.SUM)
        reduce(total, dist.ReduceOp.SUM)
        self._total, self._largest = total, largest
        self._softmax, self.losses = self._steps.calculate_cross_entropy_loss(
            exponentials, predicted, total
        )

    def gradient(self, upstream: Tensor, z_loss: float = 0.0) -> Tensor:
        """Gradient of the logits ``[tokens, vocabulary / size]``, given that of every token's
        loss."""
        if z_loss:
            return self._with_z(upstream, 2 * z_loss * (self._total.log() + self._largest))
        return self._plain(upstream)

    def _with_z(self, upstream: Tensor, more: Tensor) -> Tensor:
        """(softmax · (1 + more) - hit) · upstream; d log² Z / d logits is 2 log Z · softmax."""
        rows = torch.arange(len(upstream), device=upstream.device)
        hit = (~self._mask).float().view(-1)
        gradient = self._plain(upstream * (1 + more))
        gradient[rows, self._targets] += hit * more * upstream
        return gradient

    def _plain(self, upstream: Tensor) -> Tensor:
        operands = self._steps.prepare_gradient_calculation_operands(self._softmax, self._mask)
        flat, rows, update, result = operands
        logits_gradient: Tensor = self._steps.calculate_gradients(
            flat, rows, self._targets, update, result, upstream
        )
        return logits_gradient


def _with_gradient(
    logits: Tensor, targets: Tensor, upstream: Tensor, projection: Projection, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Losses of a block of tokens, and the gradient of their logits, which may be overwritten."""
    if projection.kernels.compiled and projection.tp.size == 1:
        fused: tuple[Tensor, Tensor] = _compiled_steps()(logits, targets, upstream, z_loss)
        return fused
    cross_entropy = _CrossEntropy(logits, targets, projection.tp)
    return cross_entropy.losses, cross_entropy.gradient(upstream, z_loss).to(logits.dtype)


@cache
def _compiled_steps() -> Any:
    return compiled(_steps)


def _steps(
    logits: Tensor, targets: Tensor, upstream: Tensor, z_loss: float
) -> tuple[Tensor, Tensor]:
    """The same as `_CrossEntropy`, as one expression that a compiler turns into two passes; the
    gradient overwrites the logits."""
    wide, index = logits.float(), targets[:, None]
    largest = wide.amax(-1, keepdim=True)
    exponentials = (wide - largest).exp()
    total = exponentials.sum(-1, keepdim=True)
    losses = total.log() + largest - wide.gather(1, index)
    hit = torch.arange(logits.shape[1], device=logits.device)[None, :] == index
    softmax = exponentials / total
    if z_loss:
        softmax = softmax * (1 + 2 * z_loss * (total.log() + largest))
    gradient = (softmax - hit.float()) * upstream[:, None]
    return losses[:, 0], logits.copy_(gradient)


class _MeanCrossEntropy(torch.autograd.Function):
    """Mean loss of ``hidden @ weight.T``; keeps its two gradients instead of the logits."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        has_label: Tensor | None,
        projection: Projection,
        z_loss: float,
    ) -> Tensor:
        upstream = torch.full_like(targets, 1, dtype=torch.float32) / len(targets)
        if has_label is not None:
            upstream = has_label / has_label.sum()
        wanted = any(ctx.needs_input_grad)
        rows = projection.rows(len(targets))
        sums = _Gradients(hidden, weight, rows) if wanted else None
        losses = []
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            logits, slope = projection.of(hidden[part], weight)
            if sums is None:
                losses.append(_CrossEntropy(logits, targets[part], projection.tp).losses)
                continue
            part_losses, of_logits = _with_gradient(
                logits, targets[part], upstream[part], projection, z_loss
            )
            if slope is not None:
                of_logits *= slope
            losses.append(part_losses)
            sums.add(part, of_logits)
        every = torch.cat(losses) if len(losses) > 1 else losses[0]
        loss = every.mean() if has_label is None else (every * has_label).sum() / has_label.sum()
        if sums is not None:
            # 0, or NaN if the loss is not finite: such a loss must not lead to an update, but its
            # own gradient can be finite (a label to which the model gives probability 0).
            ctx.save_for_backward(*sums.finished(), 0.0 * loss)
        return loss

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        of_hidden, of_weight, spoiled = ctx.saved_tensors
        upstream = upstream + spoiled
        # Saved only for this call: it may be overwritten.
        return of_hidden.mul_(upstream), of_weight.mul_(upstream), *[None] * 4


class _Gradients:
    """Gradients of hidden states and weight, summed over blocks of tokens."""

    def __init__(self, hidden: Tensor, weight: Tensor, rows: int) -> None:
        self._hidden, self._weight = hidden, weight
        self._of_hidden = torch.empty_like(hidden)
        # Sums in bf16 would lose digits with every block.
        several = len(hidden) > rows
        self._of_weight = torch.zeros_like(weight, dtype=torch.float32) if several else None

    def add(self, part: slice, of_logits: Tensor) -> None:
        torch.mm(of_logits, self._weight, out=self._of_hidden[part])
        if self._of_weight is None:
            self._of_weight = of_logits.t() @ self._hidden[part]
        else:
            _add_product(self._of_weight, of_logits.t(), self._hidden[part])

    def finished(self) -> tuple[Tensor, Tensor]:
        assert self._of_weight is not None
        return self._of_hidden, self._of_weight.to(self._weight.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product to a float32 sum; on a GPU, the product itself is not rounded to 16 bits."""
    if left.is_cuda and left.dtype != total.dtype:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right

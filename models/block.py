"""The transformer block, and consecutive compiled blocks as a chain."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.config import GPTConfig
from models.documents import Activation, joined, split
from models.kernels import Kernels, compiled
from models.layers import MLP, Attention, Norm, ParameterFactory


class Block(nn.Module):
    """Pre-norm transformer block, sequential or parallel residual."""

    def __init__(
        self, config: GPTConfig, layer: int, factory: ParameterFactory, kernels: Kernels
    ) -> None:
        super().__init__()
        self.parallel_residual, self.recompute = config.parallel_residual, kernels.recompute
        self.attention_norm = Norm(config, factory, f"blocks.{layer}.attention_norm", layer)
        self.attention = Attention(config, layer, factory, kernels)
        self.mlp = None
        if config.mlp:
            self.mlp_norm = Norm(config, factory, f"blocks.{layer}.mlp_norm", layer)
            self.mlp = MLP(config, layer, factory, kernels)
        self._compiled = self._compiled_link = None
        if kernels.compiled:
            self._compiled = compiled(self._forward, kernels.selective)
            self._compiled_link = compiled(self._link, kernels.selective)

    def forward(self, x: Activation) -> Activation:
        hidden, starts = split(x)
        if self._compiled is not None:
            self.attention.prepare(hidden)
        if self.recompute and torch.is_grad_enabled():
            # Reentrant: ZeRO-3 frees parameters between the two passes, which the
            # non-reentrant form takes for changed metadata.
            forward = self._compiled or self._forward
            hidden = checkpoint(forward, hidden, starts, use_reentrant=True)
        elif self._compiled is not None and torch.is_grad_enabled():
            # Batches of training have one shape; those of an evaluation would each be compiled.
            hidden = self._compiled(hidden, starts)
        else:
            hidden = self._forward(hidden, starts)
        return joined(hidden, starts)

    def link(self, x: Tensor, more: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        """Apply the compiled block to ``x + more``, and leave its own last sum to the caller.

        Returns:
            Two summands of the output.
        """
        assert self._compiled_link is not None
        self.attention.prepare(x)
        summands: tuple[Tensor, Tensor] = self._compiled_link(x, more, starts)
        return summands

    def _link(self, x: Tensor, more: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._summands(x + more, starts)

    def _forward(self, x: Tensor, starts: Tensor | None) -> Tensor:
        attended, out = self._summands(x, starts)
        return attended + out

    def _summands(self, x: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        attention: Tensor = self.attention(self.attention_norm(x), starts)
        if self.mlp is None:
            return x, attention
        attended = x + attention
        return attended, self.mlp(self.mlp_norm(x if self.parallel_residual else attended))


class Chain:
    """Consecutive compiled blocks, as a function.

    In training, the sum at the end of a block is computed by the code of the next block, which
    takes fewer operations: a compiler fuses it with the norm there. One code serves all blocks, as
    without a chain.
    """

    def __init__(self, blocks: list[Block]) -> None:
        self._blocks = blocks

    def __call__(self, x: Activation) -> Activation:
        if not torch.is_grad_enabled():
            for block in self._blocks:
                x = block(x)
            return x
        hidden, starts = split(x)
        # With a gradient, like every later summand: otherwise there would be a second code.
        more = torch.zeros_like(hidden, requires_grad=True)
        for block in self._blocks:
            hidden, more = block.link(hidden, more, starts)
        return joined(hidden + more, starts)

"""Building blocks: parameters with roles, norms, rotary embeddings, attention, MLP."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from models.activated import activated_linear, activation
from models.config import GPTConfig
from models.documents import attention_by_flex, positions_of, same_document
from models.initial import Initial, declare
from models.joined import linear_in_one
from models.kernels import DEFAULT_KERNELS, Kernels
from models.parallel import TensorParallel, enter, leave, replicated, sum_gradient
from models.products import attention_by_products, torch_attention
from models.roles import ParameterInfo, Role
from models.rotary import Rotary
from models.wide_sums import layer_norm

Storage = Literal["drawn", "empty", "shape"]
"""What new parameters have: their initial values, memory for any, or a shape and no memory (they
become views of a flat buffer)."""


@dataclass(frozen=True)
class ParameterFactory:
    """Creates parameters whose values depend only on (seed, name, position), never on the grid."""

    seed: int
    tp: TensorParallel = TensorParallel()
    storage: Storage = "drawn"
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    """Default: PyTorch's."""

    def normal(
        self,
        name: str,
        shape: tuple[int, ...],
        role: Role,
        layer: int | None,
        std: float,
        partition_dim: int | None = None,
        rows: int | None = None,
    ) -> nn.Parameter:
        """This process's shard of a Gaussian tensor.

        Args:
            shape: global shape.
            partition_dim: dimension that tensor parallelism splits.
            rows: fill only this many leading rows (vocabulary padding stays zero), so that the
                values do not depend on how much padding the grid needs.
        """
        info = ParameterInfo(name, role, layer, shape, partition_dim)
        return self._made(Initial(self.seed, info, shape[0] if rows is None else rows, std))

    def constant(
        self,
        name: str,
        shape: tuple[int, ...],
        role: Role,
        layer: int | None,
        value: float,
        partition_dim: int | None = None,
    ) -> nn.Parameter:
        """This process's shard of a tensor filled with ``value``."""
        info = ParameterInfo(name, role, layer, shape, partition_dim)
        return self._made(Initial(self.seed, info, shape[0], None, value))

    def _made(self, initial: Initial) -> nn.Parameter:
        info, shape = initial.info, list(initial.info.shape)
        if info.partition_dim is not None:
            shape[info.partition_dim] //= self.tp.size
        if self.storage == "drawn":
            values = initial.part(self.tp.rank, self.tp.size).view(shape)
            values = values.to(self.device, self.dtype)
        elif self.storage == "empty":
            values = torch.empty(shape, device=self.device, dtype=self.dtype)
        else:
            values = torch.empty((), device=self.device, dtype=self.dtype).expand(shape)
        return declare(nn.Parameter(values), initial)


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension."""

    def __init__(
        self, config: GPTConfig, factory: ParameterFactory, name: str, layer: int | None
    ) -> None:
        super().__init__()
        self.config, self.tp = config, factory.tp
        shape = (config.hidden_size,)
        self.weight = factory.constant(f"{name}.weight", shape, Role.NORM, layer, 1.0)
        self.bias = None
        if config.norm == "layernorm":
            self.bias = factory.constant(f"{name}.bias", shape, Role.BIAS, layer, 0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = replicated(self.weight, self.tp)
        if self.bias is None:
            return F.rms_norm(x, weight.shape, weight, self.config.norm_epsilon)
        bias = replicated(self.bias, self.tp)
        return layer_norm(x, weight, bias, self.config.norm_epsilon)


Weight = TypeVar("Weight", torch.Tensor, torch.Tensor | None)


def shares_keys(config: GPTConfig, tensor_parallel: int) -> bool:
    """Whether there are more tensor-parallel processes than key/value heads.

    Then every process holds the keys and values of all heads, as it holds norms, and uses those of
    one head.
    """
    return tensor_parallel > config.key_value_heads


def own_keys(config: GPTConfig, tp: TensorParallel) -> slice:
    """The rows of keys and values that a process uses of those of all heads."""
    own = tp.rank * config.key_value_heads // tp.size
    return slice(own * config.head_size, (own + 1) * config.head_size)


class Attention(nn.Module):
    """Multi-head or grouped-query attention with separate Q, K and V parameters."""

    def __init__(
        self,
        config: GPTConfig,
        layer: int,
        factory: ParameterFactory,
        kernels: Kernels = DEFAULT_KERNELS,
    ) -> None:
        super().__init__()
        self.config, self.tp, self.layer, self.kernels = config, factory.tp, layer, kernels
        width, head = config.hidden_size, config.head_size
        queries = config.num_attention_heads * head
        keys = config.key_value_heads * head
        std, output_std = config.init_stds
        prefix = f"blocks.{layer}.attention"
        shared = shares_keys(config, self.tp.size)
        self._own_keys = own_keys(config, self.tp) if shared else None
        split = None if shared else 0

        def weight(part: str, rows: int, role: Role, split: int | None) -> nn.Parameter:
            name = f"{prefix}.{part}.weight"
            return factory.normal(name, (rows, width), role, layer, std, split)

        def bias(part: str, size: int, partition: int | None) -> nn.Parameter | None:
            if not config.biases:
                return None
            name = f"{prefix}.{part}.bias"
            return factory.constant(name, (size,), Role.BIAS, layer, 0.0, partition)

        def gain(part: str) -> nn.Parameter | None:
            if not config.qk_norm:
                return None
            name = f"{prefix}.{part}_norm.weight"
            return factory.constant(name, (head,), Role.NORM, layer, 1.0)

        self.query = weight("query", queries, Role.QUERY, 0)
        self.key = weight("key", keys, Role.KEY, split)
        self.value = weight("value", keys, Role.VALUE, split)
        self.query_bias = bias("query", queries, 0)
        self.key_bias = bias("key", keys, split)
        self.value_bias = bias("value", keys, split)
        self.query_gain, self.key_gain = gain("query"), gain("key")
        self.output = factory.normal(
            f"{prefix}.output.weight", (width, queries), Role.ATTENTION_OUTPUT, layer, output_std, 1
        )
        self.output_bias = bias("output", width, None)
        self.watch: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], None] | None = None
        """Gets queries, keys and the starts of documents of every pass (`models.logits`)."""
        self.rotary = None
        if config.rotary_dim:
            self.rotary = Rotary(config.rotary_dim, config.rotary_base, config.rotary_scaling)

    def prepare(self, x: torch.Tensor) -> None:
        """Make the tables of the positions of ``x`` outside compiled code, which would be compiled
        once without and once with them."""
        if self.rotary is not None:
            parts = self.tp.size if self.tp.sequence_parallel else 1
            self.rotary.tables(x.shape[0] * parts, x.device)

    def forward(self, x: torch.Tensor, starts: torch.Tensor | None = None) -> torch.Tensor:
        """``[sequence, batch, hidden]`` to the same shape.

        Args:
            starts: of documents, ``[batch, whole sequence]``, if attention stays inside them.
        """
        q, k, v = (self._heads(part) for part in self._projected(enter(x, self.tp)))
        if self._frees_joined(q):
            q = q.clone()
        q, k = self._normalised(q, self.query_gain), self._normalised(k, self.key_gain)
        if self.rotary is not None:
            positions = None if starts is None else positions_of(starts)
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        group = q.shape[1] // k.shape[1]
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        if self.watch is not None:
            self.watch(q, k, starts)
        mixed = self._mixed(q, k, v, starts)
        mixed = mixed.permute(2, 0, 1, 3).flatten(2)
        product = partial(F.linear, mixed, self.output)
        return row_parallel(product, self.output_bias, self.tp, self.kernels.joined)

    def _projected(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, each ``[sequence, batch, heads * head]``."""
        weights = self.query, self._own(self.key), self._own(self.value)
        biases = self.query_bias, self._own(self.key_bias), self._own(self.value_bias)
        if not self.kernels.joined:
            return tuple(F.linear(x, *pair) for pair in zip(weights, biases, strict=True))
        joined = linear_in_one(x, weights, tuple(bias for bias in biases if bias is not None))
        return torch.split(joined, [weight.shape[0] for weight in weights], -1)

    def _frees_joined(self, q: torch.Tensor) -> bool:
        """Whether a copy of the queries frees the product that they share with keys and values.

        In low precision the backward pass has copies of keys and values (`torch_attention`). A view
        of the queries would keep the memory of all three.
        """
        copied = self.rotary is not None  # rotation makes a copy
        seen = self.query_gain is not None  # the norm of the keys needs the product too
        by_copies = q.dtype.itemsize < 4 and self.config.attention == "softmax"
        return self.kernels.joined and by_copies and not copied and not seen

    def _own(self, weight: Weight) -> Weight:
        """The rows of this process's heads of a key's or value's weight, or the bias."""
        if weight is None or self._own_keys is None:
            return weight
        # Each process sees only its own queries: the gradient of a row is the sum over those that
        # use it.
        return sum_gradient(weight, self.tp)[self._own_keys]

    def _mixed(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        starts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Values mixed by scores, all ``[batch, heads, sequence, head]``."""
        causal = self.config.causal
        if self.config.attention == "softmax":
            if starts is not None:
                if self.kernels.documents == "flex" and causal:
                    return attention_by_flex(q, k, v, starts)
                return attention_by_products(q, k, v, causal, starts)
            if self.kernels.attention == "products":
                return attention_by_products(q, k, v, causal)
            return torch_attention(q, k, v, causal)
        scores = q @ k.mT * self.config.head_size**-0.5
        length = q.shape[-2]
        # The numbers of visible positions, in float32: bf16 has no integer between 256 and 258.
        counts = torch.promote_types(q.dtype, torch.float32)
        seen = None if starts is None else same_document(starts, causal)
        visible = torch.full((length, 1), length, device=q.device, dtype=counts)
        if seen is not None:
            visible = seen.sum(-1, keepdim=True, dtype=counts)
        elif causal:
            visible = torch.arange(1, length + 1, device=q.device, dtype=counts).unsqueeze(1)
        if self.config.attention == "sigmoid":
            weights = torch.sigmoid(scores - visible.log())
        else:
            weights = scores / visible
        weights = weights.to(q.dtype)
        if seen is not None:
            return (weights * seen) @ v
        return (weights.tril() if causal else weights) @ v

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        heads: torch.Tensor = x.unflatten(-1, (-1, self.config.head_size))
        return heads.permute(1, 2, 0, 3)

    def _normalised(self, x: torch.Tensor, gain: nn.Parameter | None) -> torch.Tensor:
        if gain is None:
            return x
        # Every process sees only its own heads: the shared gain's gradient is their sum.
        weight = sum_gradient(gain, self.tp)
        return F.rms_norm(x, weight.shape, weight, self.config.norm_epsilon)


class MLP(nn.Module):
    """Two-layer perceptron, or SwiGLU."""

    def __init__(
        self, config: GPTConfig, layer: int, factory: ParameterFactory, kernels: Kernels
    ) -> None:
        super().__init__()
        self.config, self.tp, self.kernels = config, factory.tp, kernels
        width, inner = config.hidden_size, config.ffn_size
        std, output_std = config.init_stds
        prefix = f"blocks.{layer}.mlp"
        self.into = factory.normal(
            f"{prefix}.in.weight", (inner, width), Role.MLP_IN, layer, std, 0
        )
        self.gate = None
        if config.activation == "swiglu":
            self.gate = factory.normal(
                f"{prefix}.gate.weight", (inner, width), Role.MLP_GATE, layer, std, 0
            )
        self.out = factory.normal(
            f"{prefix}.out.weight", (width, inner), Role.MLP_OUT, layer, output_std, 1
        )
        self.into_bias = self.out_bias = None
        if config.biases:
            self.into_bias = factory.constant(
                f"{prefix}.in.bias", (inner,), Role.BIAS, layer, 0.0, 0
            )
            self.out_bias = factory.constant(f"{prefix}.out.bias", (width,), Role.BIAS, layer, 0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[sequence, batch, hidden]`` to the same shape."""
        x = enter(x, self.tp)
        inner = F.linear(x, self.into, self.into_bias)
        parts = (inner,) if self.gate is None else (F.linear(x, self.gate), inner)
        return row_parallel(self._product(parts), self.out_bias, self.tp, self.kernels.joined)

    def _product(self, parts: tuple[torch.Tensor, ...]) -> Product:
        """The second matrix times the value of the activation function."""
        kind = self.config.activation
        if self.kernels.selective and not self.kernels.compiled:
            return partial(activated_linear, kind, parts, self.out)
        if self.kernels.compiled and kind == "gelu_tanh":
            return partial(F.linear, gelu_by_exp(*parts), self.out)
        return partial(F.linear, activation(kind, parts), self.out)


Product = Callable[[torch.Tensor | None], torch.Tensor]
"""A product with a weight, plus a bias."""


def row_parallel(
    product: Product, bias: torch.Tensor | None, tp: TensorParallel, joined: bool
) -> torch.Tensor:
    """The product with a weight whose columns are split, plus a bias, which is added once.

    Args:
        joined: add the bias inside the product, where one process has all of it.
    """
    if joined and tp.size == 1:
        return product(bias)
    y = leave(product(None), tp)
    return y if bias is None else y + replicated(bias, tp)


def gelu_by_exp(x: torch.Tensor) -> torch.Tensor:
    """GELU with Hendrycks & Gimpel's tanh, written with exp, which is faster in compiled code."""
    wide = x.float()
    inner = math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3)
    return (wide * torch.sigmoid(inner)).to(x.dtype)  # ½(1 + tanh u) = sigmoid(2u)

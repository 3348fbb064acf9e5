"""Transformers as a list of layers, run as a whole in one process or cut into pipeline stages.

Every layer takes and returns one tensor, so that a sequence of them is the model and any
contiguous part of it is a pipeline stage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from models.block import Block, Chain
from models.config import GPTConfig
from models.documents import Activation, document_starts, positions_of, split
from models.kernels import DEFAULT_KERNELS, Kernels
from models.layers import Attention, Norm, ParameterFactory
from models.loss import Projection
from models.parallel import TensorParallel, embed, replicated
from models.roles import ModelError, ParameterInfo, Role, declared_parameters, info_of
from models.wide_sums import embedding


class Embedding(nn.Module):
    """Token embedding; ``[batch, sequence]`` integers to ``[sequence, batch, hidden]``."""

    def __init__(
        self,
        config: GPTConfig,
        factory: ParameterFactory,
        kernels: Kernels,
        begins: int | None = None,
    ) -> None:
        """
        Args:
            begins: the token that begins documents, if attention stays inside them in training.
                An evaluation scores each document by itself.
        """
        super().__init__()
        self.config, self.tp, self.kernels, self.begins = config, factory.tp, kernels, begins
        self.weight = vocabulary_weight(config, factory, "embedding.weight", Role.EMBEDDING)

    def forward(self, tokens: torch.Tensor) -> Activation:
        x = embed(tokens.t().contiguous(), self.weight, self.tp)
        if self.begins is None or not self.training:
            return x
        return x, document_starts(tokens, self.begins)


class PatchEmbedding(nn.Module):
    """Linear map of patches; ``[batch, patches, values]`` to ``[patches, batch, hidden]``."""

    def __init__(self, config: GPTConfig, factory: ParameterFactory) -> None:
        super().__init__()
        shape = (config.hidden_size, config.patch_dim)
        std = config.patch_dim**-0.5  # patches have unit size, they are not one-hot
        self.weight = factory.normal("embedding.weight", shape, Role.EMBEDDING, None, std)
        self.bias = factory.constant("embedding.bias", shape[:1], Role.BIAS, None, 0.0)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        patches = patches.transpose(0, 1).to(self.weight.dtype)
        return F.linear(patches, self.weight, self.bias)


class Pool(nn.Module):
    """Mean over the patches; ``[patches, batch, hidden]`` to ``[1, batch, hidden]``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(0, keepdim=True)


class LearnedPosition(nn.Module):
    """Adds a learned vector per position."""

    def __init__(self, config: GPTConfig, factory: ParameterFactory) -> None:
        super().__init__()
        self.tp = factory.tp
        shape = (config.context, config.hidden_size)
        std = config.init_stds[0]
        self.weight = factory.normal("position.weight", shape, Role.POSITION, None, std)

    def forward(self, x: Activation) -> Activation:
        hidden, starts = split(x)
        start = hidden.shape[0] * self.tp.rank if self.tp.sequence_parallel else 0
        rows = slice(start, start + hidden.shape[0])
        weight = replicated(self.weight, self.tp)
        if starts is None:
            whole = hidden.shape[0] == weight.shape[0]  # a slice has operations of its own
            return hidden + (weight if whole else weight[rows]).unsqueeze(1)
        return hidden + embedding(positions_of(starts)[:, rows].t(), weight), starts


class FinalNorm(Norm):
    """The norm after the last block, where documents no longer matter."""

    def forward(self, x: Activation) -> torch.Tensor:
        return super().forward(split(x)[0])


class Head(nn.Module):
    """Untied output projection to this rank's part of the vocabulary."""

    def __init__(self, config: GPTConfig, factory: ParameterFactory, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.tp, self.kernels = config, factory.tp, kernels
        self.weight = vocabulary_weight(config, factory, "head.weight", Role.HEAD)

    def forward(self, x: torch.Tensor) -> Projection:
        return project(self, x)


def project(module: Embedding | Head, x: torch.Tensor) -> Projection:
    """The logits of a head or tied embedding, not yet computed."""
    softcap = module.config.logit_softcap
    return Projection(x, module.weight, _padding_bias(module), module.tp, module.kernels, softcap)


def vocabulary_weight(
    config: GPTConfig, factory: ParameterFactory, name: str, role: Role
) -> nn.Parameter:
    """A vocabulary-parallel ``[padded vocabulary, hidden]`` matrix, its padding zero."""
    if not config.vocabulary_size:
        raise ModelError("model.vocabulary_size is 0: give it, or data that says how many")
    shape = (config.padded_vocabulary(factory.tp.size), config.hidden_size)
    std = config.init_stds[0]
    return factory.normal(name, shape, role, None, std, 0, rows=config.vocabulary_size)


def _padding_bias(module: Embedding | Head) -> torch.Tensor | None:
    """-inf on padded vocabulary entries, or None where this rank has none."""
    rows = module.config.padded_vocabulary(module.tp.size) // module.tp.size
    valid = module.config.vocabulary_size - module.tp.rank * rows
    if valid >= rows:
        return None
    index = torch.arange(rows, device=module.weight.device)
    bias = torch.zeros(rows, dtype=module.weight.dtype, device=module.weight.device)
    return bias.masked_fill_(index >= max(valid, 0), float("-inf"))


@dataclass(frozen=True)
class LayerBlueprint:
    """How to build one layer of the model, and what it shares with another."""

    build: type[nn.Module]
    arguments: tuple[Any, ...]
    tied: str | None = None
    """Layers with the same key share one module (the tied embedding)."""
    forward: Callable[[Any, torch.Tensor], Any] | None = None


def layer_blueprints(
    config: GPTConfig, factory: ParameterFactory, kernels: Kernels, begins: int | None = None
) -> list[LayerBlueprint]:
    """The model as a list of layers, from tokens ``[batch, sequence]`` to a `Projection`.

    Args:
        begins: the token that begins documents, if attention stays inside them in training.

    Raises:
        ModelError: if tensor parallelism does not divide the heads or the MLP.
    """
    check_tensor_parallel(config, factory.tp.size)
    if config.patch_dim and factory.tp.sequence_parallel:
        raise ModelError(
            "grid.sequence_parallel: not supported for images, which have few patches; remove it"
        )
    tied = "embedding" if config.tied_head else None
    if config.patch_dim:
        plans = [LayerBlueprint(PatchEmbedding, (config, factory))]
    else:
        plans = [LayerBlueprint(Embedding, (config, factory, kernels, begins), tied)]
    if config.position == "learned":
        plans.append(LayerBlueprint(LearnedPosition, (config, factory)))
    plans += [
        LayerBlueprint(Block, (config, layer, factory, kernels))
        for layer in range(config.num_layers)
    ]
    plans.append(LayerBlueprint(FinalNorm, (config, factory, "final_norm", None)))
    if config.patch_dim:
        plans.append(LayerBlueprint(Pool, ()))
    if config.tied_head:
        plans.append(LayerBlueprint(Embedding, (config, factory, kernels), tied, project))
    else:
        plans.append(LayerBlueprint(Head, (config, factory, kernels), forward=project))
    return plans


def check_tensor_parallel(config: GPTConfig, size: int) -> None:
    """Refuse a tensor-parallel size that would cut a head or the MLP unevenly.

    Raises:
        ModelError: naming the key that does not fit, and the sizes that fit all.
    """
    counts = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.key_value_heads,
        "ffn_hidden_size": config.ffn_size,
    }
    unfit = _cut_by(counts, size)
    if unfit:
        heads = config.num_attention_heads
        fit = [str(n) for n in range(1, heads + 1) if not _cut_by(counts, n)]
        raise ModelError(
            f"model.{unfit}: {counts[unfit]} cannot be divided over grid.tensor_parallel={size}; "
            f"this model can be divided over {', '.join(fit)}"
        )


def _cut_by(counts: dict[str, int], size: int) -> str:
    """The first count that so many processes cannot divide; empty if there is none."""
    for key, count in counts.items():
        # A key-value head for each process, or one that several processes share.
        if count % size and not (key == "num_key_value_heads" and size % count == 0):
            return key
    return ""


class GPT(nn.Module):
    """The whole model in one process (or in each tensor-parallel process)."""

    def __init__(
        self,
        config: GPTConfig,
        factory: ParameterFactory,
        kernels: Kernels = DEFAULT_KERNELS,
        begins: int | None = None,
        built: Callable[[nn.Module], None] | None = None,
    ) -> None:
        """
        Args:
            begins: the token that begins documents, if attention stays inside them in training.
            built: is called with each layer before the next one is built.
        """
        super().__init__()
        self.config, self.tp = config, factory.tp
        self.layers = nn.ModuleList()
        self.functions: list[Callable[[torch.Tensor], Any]] = []
        shared: dict[str, nn.Module] = {}
        for plan in layer_blueprints(config, factory, kernels, begins):
            module = shared.get(plan.tied or "")
            if module is None:
                module = plan.build(*plan.arguments)
                self.layers.append(module)
                if built is not None:
                    built(module)
                if plan.tied:
                    shared[plan.tied] = module
            function = module if plan.forward is None else partial(plan.forward, module)
            self.functions.append(function)
        if kernels.compiled and not kernels.recompute:
            self.functions = _with_chains(self.functions)

    def forward(
        self,
        tokens: torch.Tensor,
        finish: Callable[[Projection], torch.Tensor] = Projection.logits,
    ) -> torch.Tensor:
        """Apply ``finish`` to the last layer while its weight is available (ZeRO-3 frees it later).

        Args:
            tokens: ``[batch, sequence]`` integers, or ``[batch, patches, values]`` of images.
            finish: default: return the logits ``[sequence, batch, vocabulary / tensor_parallel]``
                (for images ``[1, batch, classes / tensor_parallel]``).
        """
        x: Any = tokens
        for function in self.functions:
            x = function(x)
        return finish(x)


def _with_chains(functions: list[Callable[[Any], Any]]) -> list[Callable[[Any], Any]]:
    """The same functions, with consecutive blocks as one `Chain`."""
    joint: list[Callable[[Any], Any]] = []
    for _, group in groupby(functions, type):
        some = list(group)
        blocks = [function for function in some if isinstance(function, Block)]
        joint += [Chain(blocks)] if blocks else some
    return joint


def attention_layers(module: nn.Module) -> list[Attention]:
    """The attention layers that this process holds, by layer."""
    layers = [part for part in module.modules() if isinstance(part, Attention)]
    return sorted(layers, key=lambda part: part.layer)


def whole_model(config: GPTConfig, tensor_parallel: int = 1) -> list[ParameterInfo]:
    """Every parameter of the model, without allocating memory.

    Args:
        tensor_parallel: affects only the padding of the vocabulary.
    """
    tp = TensorParallel(size=tensor_parallel)
    model = GPT(config, ParameterFactory(0, tp, "shape", "meta"))
    return [info_of(parameter) for parameter in declared_parameters(model)]

"""The roles of parameters: the vocabulary that decay rules, probes and checkpoints share.

The module that creates a parameter declares its role and layer, so that no result ever depends on a
regular expression over names.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import nn


class ModelError(ValueError):
    """A model configuration that cannot be built; the message names the key and what to do."""


class Role(StrEnum):
    """The function of a parameter in the network."""

    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    ATTENTION_OUTPUT = "attention_output"
    MLP_IN = "mlp_in"
    MLP_GATE = "mlp_gate"
    MLP_OUT = "mlp_out"
    EMBEDDING = "embedding"
    POSITION = "position"
    HEAD = "head"
    NORM = "norm"
    BIAS = "bias"


QK = (Role.QUERY, Role.KEY)
VO = (Role.VALUE, Role.ATTENTION_OUTPUT)
ATTENTION = QK + VO
MLP = (Role.MLP_IN, Role.MLP_GATE, Role.MLP_OUT)

ALIASES: dict[str, tuple[Role, ...]] = {
    "attention": ATTENTION,
    "qk": QK,
    "vo": VO,
    "mlp": MLP,
    **{role.value: (role,) for role in Role},
}
"""Every word that a recipe may use for roles, from the widest to single roles."""


@dataclass(frozen=True)
class ParameterInfo:
    """Identity of one parameter of the whole model, the same on every process grid."""

    name: str
    """Global name, for example ``blocks.3.attention.query.weight``."""
    role: Role
    layer: int | None
    """Index of the transformer block, or None outside the blocks."""
    shape: tuple[int, ...]
    """Global shape: all tensor-parallel shards together, vocabulary padding included."""
    partition_dim: int | None
    """The dimension that tensor parallelism splits, or None if every process holds it whole."""

    @property
    def numel(self) -> int:
        """Number of elements of the global tensor."""
        return int(torch.Size(self.shape).numel())


def info_of(parameter: torch.Tensor) -> ParameterInfo:
    """The `ParameterInfo` declared for ``parameter``.

    Raises:
        ModelError: if no module declared one, since such a parameter would escape every rule.
    """
    info = getattr(parameter, "info", None)
    if not isinstance(info, ParameterInfo):
        raise ModelError(
            f"a parameter of shape {tuple(parameter.shape)} has no declared role: "
            "create it with ParameterFactory"
        )
    return info


def declared_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``module``, each once, in a fixed order; each must have a role."""
    parameters = list(module.parameters())
    for parameter in parameters:
        info_of(parameter)
    return parameters

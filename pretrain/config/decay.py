"""The `optimizer.weight_decay` section: how much, at which rate, in which direction, and when."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny

from pretrain.config.section import Section
from pretrain.decay.policy import PolicySection
from pretrain.decay.registry import POLICIES

Coupling = Literal["lr", "lr2", "none"]
Form = Literal["decoupled", "l2", "cautious", "adadecay", "nuclear"]


class DecayRule(Section):
    """An exception: these roles, in these layers, decay so much."""

    roles: list[str] = Field(min_length=1)
    layers: str = Field("", description='"0-3,7": blocks; empty: everywhere')
    decay: float = Field(ge=0)


DecayPolicy = Annotated[SerializeAsAny[PolicySection], BeforeValidator(POLICIES.validate)]


class WeightDecayConfig(Section):
    """Weight decay by role. Narrower words win: rules, query, qk, attention, default.

    An update takes ``rate · λ · direction`` from a weight: λ from the keys by role, moved by
    ``policies``; the rate by ``coupling``; the direction by ``form``.
    """

    default: float = Field(0.1, ge=0, description="every matrix not named below")
    attention: float | None = Field(None, ge=0, description="query, key, value, attention_output")
    qk: float | None = Field(None, ge=0)
    vo: float | None = Field(None, ge=0)
    query: float | None = Field(None, ge=0)
    key: float | None = Field(None, ge=0)
    value: float | None = Field(None, ge=0)
    attention_output: float | None = Field(None, ge=0)
    mlp: float | None = Field(None, ge=0, description="mlp_in, mlp_gate, mlp_out")
    mlp_in: float | None = Field(None, ge=0)
    mlp_gate: float | None = Field(None, ge=0)
    mlp_out: float | None = Field(None, ge=0)
    embedding: float | None = Field(None, ge=0)
    position: float | None = Field(None, ge=0)
    head: float | None = Field(None, ge=0)
    norm: float | None = Field(None, ge=0, description="0 unless set")
    bias: float | None = Field(None, ge=0, description="0 unless set")
    rules: list[DecayRule] = Field(default=[], description="first match wins, over all above")
    coupling: Coupling | dict[str, Coupling] = Field(
        "lr",
        description="rate: η (AdamW), η²/η_peak (AdamC), or 1 a step; one word, or by role",
    )
    form: Form | dict[str, Form] = Field(
        "decoupled",
        description="w; L2 in the gradient; w where it agrees with the update (cautious); w by "
        "the size of its gradient (adadecay); the subgradient of ‖ABᵀ‖_* (nuclear)",
    )
    adadecay_slope: float = Field(4.0, gt=0, description="steepness of AdaDecay's sigmoid")
    nuclear_every: int = Field(1, ge=1, description="steps between nuclear steps, each so often")
    policies: list[DecayPolicy] = Field(default=[], description="what moves λ during training")


def same_policies(one: Iterable[PolicySection], other: Iterable[PolicySection]) -> bool:
    """Whether two recipes have the same policies, of the same code."""
    first, second = ([part.model_dump(mode="json") for part in parts] for parts in (one, other))
    return first == second

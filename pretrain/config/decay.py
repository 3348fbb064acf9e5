"""The `optimizer.weight_decay` section: amount, rate, direction and policies."""

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
    """An exception: the decay of some roles in some layers."""

    roles: list[str] = Field(min_length=1, description="names of keys above, such as qk or mlp_in")
    layers: str = Field("", description='blocks, such as "0-3,7"; empty: everywhere')
    decay: float = Field(ge=0, description="λ")


DecayPolicy = Annotated[SerializeAsAny[PolicySection], BeforeValidator(POLICIES.validate)]


class WeightDecayConfig(Section):
    """Weight decay by role. The most specific key wins: rules, query, qk, attention, default.

    An update subtracts ``rate · λ · direction`` from a weight. The keys by role set λ, ``policies``
    change it, ``coupling`` sets the rate, and ``form`` sets the direction.
    """

    default: float = Field(0.1, ge=0, description="every matrix not named below")
    attention: float | None = Field(None, ge=0, description="query, key, value, attention_output")
    qk: float | None = Field(None, ge=0, description="query, key")
    vo: float | None = Field(None, ge=0, description="value, attention_output")
    query: float | None = Field(None, ge=0, description="W_Q")
    key: float | None = Field(None, ge=0, description="W_K")
    value: float | None = Field(None, ge=0, description="W_V")
    attention_output: float | None = Field(None, ge=0, description="W_P, after the heads")
    mlp: float | None = Field(None, ge=0, description="mlp_in, mlp_gate, mlp_out")
    mlp_in: float | None = Field(None, ge=0, description="the MLP's first matrix")
    mlp_gate: float | None = Field(None, ge=0, description="the gate of SwiGLU")
    mlp_out: float | None = Field(None, ge=0, description="the MLP's last matrix")
    embedding: float | None = Field(None, ge=0, description="of tokens")
    position: float | None = Field(None, ge=0, description="learned positions")
    head: float | None = Field(None, ge=0, description="logits, unless tied")
    norm: float | None = Field(None, ge=0, description="gains of norms; 0 unless set")
    bias: float | None = Field(None, ge=0, description="0 unless set")
    rules: list[DecayRule] = Field(
        default=[], description="exceptions to the keys above; the first match wins"
    )
    coupling: Coupling | dict[str, Coupling] = Field(
        "lr",
        description="rate: η (AdamW), η²/η_peak (AdamC), or 1 per step; one word, or by role",
    )
    form: Form | dict[str, Form] = Field(
        "decoupled",
        description="direction: w; L2 in the gradient; w where its sign agrees with the update "
        "(cautious); w times a function of its gradient (adadecay); the subgradient of ‖ABᵀ‖_* "
        "(nuclear)",
    )
    adadecay_slope: float = Field(4.0, gt=0, description="steepness of AdaDecay's sigmoid")
    nuclear_every: int = Field(1, ge=1, description="steps between nuclear steps")
    policies: list[DecayPolicy] = Field(default=[], description="what changes λ during training")


def same_policies(policies: Iterable[PolicySection], others: Iterable[PolicySection]) -> bool:
    """Whether two recipes have the same policies with the same code."""
    first, second = (
        [part.model_dump(mode="json") for part in parts] for parts in (policies, others)
    )
    return first == second

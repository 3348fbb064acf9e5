"""The `optimizer.weight_decay` section: how much, at which rate, in which direction, and when."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Coupling = Literal["lr", "lr2", "none"]
Form = Literal["decoupled", "l2", "cautious", "adadecay", "nuclear"]


_NUMBERS = (int, float, int | float, float | None, int | float | None)


class Section(BaseModel):
    """Base of every section: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_numbers(cls, values: Any) -> Any:
        """`true` would be taken for 1, and no float holds a number of hundreds of digits."""
        for key, field in cls.model_fields.items():
            value = values.get(key) if isinstance(values, dict) else None
            if isinstance(value, bool) and field.annotation in _NUMBERS:
                raise ValueError(f"{key}: a number is wanted, got {str(value).lower()}")
            if isinstance(value, int) and abs(value) >= 1 << 63:
                raise ValueError(
                    f"{key}: a number of {value.bit_length()} bits is none of a recipe"
                )
        return values


class DecayRule(Section):
    """An exception: these roles, in these layers, decay so much."""

    roles: list[str] = Field(min_length=1)
    layers: str = Field("", description='"0-3,7": blocks; empty: everywhere')
    decay: float = Field(ge=0)


class ScheduleDecay(Section):
    """λ times a multiplier that is a function of the step (`decay_multiplier` in
    `pretrain.config.schedule`).

    ``{shape: window, roles: [attention], stop: 0.2}``: decay of attention in the first fifth only.
    """

    kind: Literal["schedule"]
    roles: list[str] = Field(min_length=1)
    shape: Literal["linear", "cosine", "step", "warmup", "window"] = "linear"
    start: int | float = Field(0.0, ge=0, description="< 1: share of the steps; else steps")
    stop: int | float | None = Field(None, ge=0, description="as start; empty: the end of the run")
    first: float = Field(1.0, ge=0, description="multiplier before (window: inside)")
    last: float = Field(0.0, ge=0, description="multiplier after (window: outside)")


class AlphaDecay(Section):
    """AlphaDecay (He et al. 2025, arXiv 2506.14562): λ of a matrix by the tail of its spectrum."""

    kind: Literal["alpha"]
    roles: list[str] = ["attention", "mlp"]
    low: float = Field(0.67, ge=0, description="multiplier of the heaviest tail (smallest α)")
    high: float = Field(5.0, ge=0, description="of the lightest; the paper: 5 AdamW, 3 Adam")
    hill: Literal["paper", "released"] = Field("paper", description="form of the Hill exponent")
    refresh: int = Field(500, ge=1, description="steps between measurements")
    normalize_mean: bool = Field(False, description="rescale the multipliers to mean 1")
    min_eigenvalues: int = Field(50, ge=4, description="smaller matrices keep λ")


class AdaptiveDecay(Section):
    """AWD (Ghiasi et al. 2023): λ·‖∇‖/‖w‖ of the whole model, smoothed, as L2 in the gradient."""

    kind: Literal["awd"]
    roles: list[str] = ["attention", "mlp"]
    memory: float = Field(0.1, ge=0, lt=1, description="share of the running mean that stays")
    form: Literal["l2", "decoupled"] = "l2"


class RankTarget(Section):
    """λ of each layer's query/key (value/output) that brings its pseudo-rank to a set value
    (`pretrain.decay.policies.rank_target`)."""

    kind: Literal["rank_target"]
    roles: list[str] = Field(["qk", "vo"], description="qk, vo or attention")
    target: float = Field(gt=0, le=1, description="mean pseudo-rank of the layer's heads")
    minimum: float | None = Field(None, gt=0, description="of λ; empty: maximum / 1000")
    maximum: float | None = Field(
        None, gt=0, description="of λ; empty: what gives the whole run the exposure 2.5"
    )
    every: int = Field(0, ge=0, description="steps between measurements; 0: 1/100 of the run")
    start: float = Field(0.15, ge=0, lt=1, description="share of Ση spent when control begins")
    until: float = Field(0.8, gt=0, le=1, description="share of Ση when the target is due")
    horizon: float = Field(0.2, gt=0, le=1, description="share of Ση in which errors are mended")
    memory: float = Field(0.05, gt=0, le=1, description="share of Ση over which drift is averaged")
    margin: float = Field(0.01, ge=0, description="aim so much above: a fall cannot be undone")


DecayPolicy = Annotated[
    ScheduleDecay | AlphaDecay | AdaptiveDecay | RankTarget, Field(discriminator="kind")
]


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

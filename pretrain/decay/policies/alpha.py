"""AlphaDecay (He et al. 2025): λ of a matrix by the heavy-tailed exponent of its spectrum."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from models.roles import ParameterInfo
from pretrain.decay.policy import Policy, PolicySection, Setting
from pretrain.decay.registry import POLICIES
from pretrain.decay.sites import Site, label
from pretrain.errors import UsageError

_FLOOR = 1e-12
"""Smaller eigenvalues, relative to the largest, are raised to this; the logarithm of 0 is −∞."""


class AlphaDecay(PolicySection):
    """AlphaDecay (He et al. 2025, arXiv 2506.14562): λ of a matrix by the tail of its spectrum."""

    roles: list[str] = Field(
        ["attention", "mlp"], min_length=1, description="matrices whose λ it sets"
    )
    low: float = Field(0.67, ge=0, description="multiplier of the heaviest tail (smallest α)")
    high: float = Field(
        5.0, ge=0, description="multiplier of the lightest tail; the paper: 5 for AdamW, 3 for Adam"
    )
    hill: Literal["paper", "released"] = Field("paper", description="form of the Hill exponent")
    refresh: int = Field(500, ge=1, description="steps between measurements")
    normalize_mean: bool = Field(False, description="rescale the multipliers to mean 1")
    min_eigenvalues: int = Field(50, ge=4, description="smaller matrices keep λ")

    def length_remarks(self, key: str, steps: int) -> Iterator[str]:
        if self.refresh >= steps:
            yield (
                f"{key}.refresh: {self.refresh:,} steps in a run of {steps:,}: the exponents are "
                "always those of the initial weights"
            )


@POLICIES.built_in("alpha")
class Alpha(Policy):
    """AlphaDecay (He et al. 2025): multipliers from the exponents of the last measurement."""

    Config = AlphaDecay
    wants, log_kind = "weights", "alpha"
    config: AlphaDecay

    def __init__(self, config: AlphaDecay, setting: Setting) -> None:
        super().__init__(config, setting)
        self.every = config.refresh
        self.exponents: dict[str, float] | None = None
        self._multipliers: dict[str, float] = {}
        if not any(map(self.measures, setting.parameters)):
            raise UsageError(
                f"{setting.key}.min_eigenvalues: no matrix of these roles has "
                f"{config.min_eigenvalues} eigenvalues; lower it"
            )

    def due(self, step: int) -> bool:
        """Due every ``refresh`` steps, and before the first update of a fork."""
        return super().due(step) or self.exponents is None

    def measures(self, info: ParameterInfo) -> bool:
        """Whether the parameter is a matrix of its roles, large enough for an exponent."""
        return super().measures(info) and min(info.shape) >= self.config.min_eigenvalues

    def figure(self, info: ParameterInfo, matrix: Tensor) -> float:
        """PL_Alpha_Hill of a matrix."""
        return hill_exponent(eigenvalues(matrix), self.config.hill)

    def observe(self, measured: dict[str, float], step: int) -> list[str]:
        """Store new exponents by site label."""
        config = self.config
        self.exponents = measured
        self._multipliers = alpha_multipliers(
            measured, config.low, config.high, config.normalize_mean
        )
        return []

    def figures(self) -> dict[str, Any]:
        """Mean, least and greatest multiplier, and the exponents."""
        values = list(self._multipliers.values()) or [1.0]
        return {
            "multiplier_mean": sum(values) / len(values),
            "multiplier_min": min(values),
            "multiplier_max": max(values),
            "exponents": self.exponents,
        }

    def move(self, site: Site, decay: float, step: int) -> float:
        return decay * self._multipliers.get(label(site), 1.0)

    def state(self) -> dict[str, Any]:
        return {"exponents": self.exponents, "multipliers": self._multipliers}

    def restore(self, state: dict[str, Any]) -> None:
        self.exponents, self._multipliers = state["exponents"], state["multipliers"]


def eigenvalues(weight: Tensor) -> Tensor:
    """Eigenvalues of WᵀW, ascending, by the Gram matrix of the shorter side in float64.

    Args:
        weight: ``[rows, columns]``.

    Returns:
        ``[min(rows, columns)]`` float64, none below 1e-12 of the largest; NaN for a matrix that is
        not finite.
    """
    weight = weight.detach().double()
    gram = weight @ weight.mT if weight.shape[0] <= weight.shape[1] else weight.mT @ weight
    if not bool(gram.isfinite().all()):  # LAPACK would raise an error
        return gram.new_full(gram.shape[:1], math.nan)
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.clamp_min(float(values[-1].clamp_min(0.0)) * _FLOOR)


def hill_exponent(values: Tensor, form: str = "paper") -> float:
    """PL_Alpha_Hill of a spectrum: the exponent of a power law fitted to its larger half.

    Args:
        values: ``[N]`` eigenvalues, ascending and positive.
        form: ``paper``: α = 1 + k / Σ_{i=1..k} ln(λ_{N−i+1}/λ_{N−k}), k = N/2 (He et al. 2025);
            ``released``: the authors' code, which counts the threshold λ among the tail.

    Returns:
        α; infinity for a flat spectrum, NaN for an empty, zero or non-finite one.
    """
    count = values.numel()
    if count < 2 or not bool(values.isfinite().all()) or float(values[-1]) <= 0:
        return math.nan
    logs = values.double().log()
    if form == "paper":
        tail = count // 2
        total = float((logs[count - tail :] - logs[count - tail - 1]).sum())
    else:
        first = count // 2
        tail = count - first
        total = float((logs[first:] - logs[first]).sum())
    return 1.0 + tail / total if total > 0 else math.inf


def alpha_multipliers(
    exponents: Mapping[str, float], low: float, high: float, normalize_mean: bool = False
) -> dict[str, float]:
    """AlphaDecay's multiplier of λ for each matrix (He et al. 2025, eq. 2).

    low + (high − low)(α − α_min)/(α_max − α_min): a heavier tail (smaller α) decays less. Equal
    exponents all give 1; a matrix whose exponent is not finite gets 1 and does not affect the
    bounds.

    Args:
        normalize_mean: divide by the mean over the matrices.
    """
    finite = [value for value in exponents.values() if math.isfinite(value)]
    if not finite or max(finite) == min(finite):
        return dict.fromkeys(exponents, 1.0)
    least, span = min(finite), max(finite) - min(finite)
    multipliers = {
        name: low + (high - low) * (value - least) / span if math.isfinite(value) else 1.0
        for name, value in exponents.items()
    }
    if normalize_mean:
        mean = sum(multipliers.values()) / len(multipliers)
        multipliers = (
            {name: value / mean for name, value in multipliers.items()} if mean > 0 else multipliers
        )
    return multipliers

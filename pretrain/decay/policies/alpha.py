"""Heavy-tailed exponents of weight matrices, and AlphaDecay's multipliers from them.

Pure functions of tensors and numbers: no distributed code, no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

_FLOOR = 1e-12
"""Eigenvalues below this share of the largest count as this: their logarithm would be −∞."""


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
    if not bool(gram.isfinite().all()):  # LAPACK would raise
        return gram.new_full(gram.shape[:1], math.nan)
    values = torch.linalg.eigvalsh(gram)
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
    exponents all give 1; a matrix whose exponent is not finite gets 1 and counts for no bound.

    Args:
        normalize_mean: divide by the mean over the matrices.
    """
    finite = [value for value in exponents.values() if math.isfinite(value)]
    if not finite or max(finite) == min(finite):
        return dict.fromkeys(exponents, 1.0)
    least, span = min(finite), max(finite) - min(finite)
    found = {
        name: low + (high - low) * (value - least) / span if math.isfinite(value) else 1.0
        for name, value in exponents.items()
    }
    if normalize_mean:
        mean = sum(found.values()) / len(found)
        found = {name: value / mean for name, value in found.items()} if mean > 0 else found
    return found

"""The formula of every rate, direction and policy of weight decay, each written from its source.

One function is one formula; ``tests/by_hand.py`` runs them. None of them calls the product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

# --- rates: what multiplies λ in an update --------------------------------------------------------


def coupled_rate(rate: float, peak: float) -> float:
    """``coupling: lr``, η_t: AdamW (Loshchilov & Hutter 2019, algorithm 2)."""
    return rate


def squared_rate(rate: float, peak: float) -> float:
    """``coupling: lr2``, η_t² / η_peak: AdamC (Defazio 2025)."""
    return rate * rate / peak


def independent_rate(rate: float, peak: float) -> float:
    """``coupling: none``, 1: decay that does not follow η (Wortsman et al. 2023)."""
    return 1.0


# --- directions: what becomes of a weight, with shrink = rate · λ ---------------------------------


def decoupled_factor(shrink: float) -> float:
    """``form: decoupled``, w ← (1 − rate·λ)·w: AdamW (Loshchilov & Hutter 2019, algorithm 2)."""
    return 1 - shrink


def l2_gradient(weight: Tensor, shrink: float, rate: float) -> Tensor:
    """``form: l2``, added to the gradient: λ·w times rate/η, the gradient of (λ/2)·‖w‖²."""
    return shrink / rate * weight


def cautious_amount(before: Tensor, after: Tensor, shrink: float) -> Tensor:
    """``form: cautious``, rate·λ·w where the update has w's sign (Chen et al. 2025).

    Args:
        before: w before the optimizer's update, which is before − after.
    """
    return shrink * before * ((before - after) * before >= 0)


def adadecay_factor(gradient: Tensor, shrink: float) -> Tensor:
    """``form: adadecay``, 1 − rate·λ·θ with θ = 2/(1 + e^(−4z)) (Nakamura & Hong 2019).

    z is |g|, standardised over the tensor.
    """
    sizes = gradient.abs()
    spread = float(sizes.double().std(correction=0)) or 1.0
    z = (sizes - sizes.double().mean()) / spread
    return (1 - shrink * 2 / (1 + torch.exp(-4 * z))).float()


def nuclear_gradient(parts: Mapping[str, Tensor], heads: int, wanted: str) -> Tensor:
    """``form: nuclear``: the gradient of Σ over heads of ‖W_Kᵀ W_Q‖_* + ‖W_P W_V‖_*.

    By autograd of an SVD. Source: the nuclear norm is what decay of both factors penalises at
    equilibrium (Kobayashi et al. 2024, lemma 3.2).

    Args:
        parts: the weights ``query``, ``key``, ``value`` and ``output`` of a layer.
        wanted: the weight whose gradient is returned.
    """
    held = {part: weight.detach().double().requires_grad_() for part, weight in parts.items()}
    width = held["query"].shape[1]
    query, key, value = (held[part].view(heads, -1, width) for part in ("query", "key", "value"))
    output = held["output"].view(width, heads, -1).permute(1, 0, 2)
    total = torch.linalg.svdvals(key.mT @ query).sum() + torch.linalg.svdvals(output @ value).sum()
    total.backward()
    gradient = held[wanted].grad
    assert gradient is not None
    return gradient.float()


# --- policies: what λ is multiplied by, or what it is ---------------------------------------------


def schedule(case: str, step: int) -> float:
    """``kind: schedule``, the shapes of docs/decay.md worked out from its words, for steps 0-3."""
    return {
        "linear": [1.0, 0.8125, 0.625, 0.4375],
        "cosine": [1.0, 1.0, 0.5, 0.0],
        "step": [1.0, 1.0, 3.0, 3.0],
        "warmup": [0.0, 1 / 3, 2 / 3, 1.0],
        "window": [0.0, 1.0, 1.0, 0.0],
        "alpha_mean": [1.0, 0.75, 0.5, 0.25],
    }[case][step]


def paper_hill(weight: np.ndarray) -> float:
    """``hill: paper``, 1 + k/Σ_{i=1..k} ln(λ_{n−i+1}/λ_{n−k}), k = n/2 (He et al. 2025).

    λ are the eigenvalues of WᵀW in ascending order, counted from 1.
    """
    values = eigenvalues(weight)
    n = len(values)
    k = n // 2
    return 1 + k / sum(math.log(values[n - i] / values[n - k - 1]) for i in range(1, k + 1))


def released_hill(weight: np.ndarray) -> float:
    """``hill: released``, AlphaDecay's published code: the threshold eigenvalue is in the tail."""
    values = eigenvalues(weight)
    n = len(values)
    i = n // 2
    m = n - i
    return float(1 + m / (np.log(values[i:]).sum() - m * math.log(values[i])))


def eigenvalues(weight: np.ndarray) -> np.ndarray:
    """Those of WᵀW that are not there by shape, in ascending order."""
    return np.sort(np.linalg.svd(weight.astype(np.float64), compute_uv=False) ** 2)


def alpha_multipliers(exponents: dict[str, float]) -> dict[str, float]:
    """``kind: alpha``, s₁ + (s₂ − s₁)(α − α_min)/(α_max − α_min) (AlphaDecay, He et al. 2025).

    With (s₁, s₂) = (0.67, 5), its values for AdamW.
    """
    low, high = min(exponents.values()), max(exponents.values())
    return {
        name: 0.67 + (5.0 - 0.67) * (value - low) / (high - low)
        for name, value in exponents.items()
    }


def with_mean_one(multipliers: dict[str, float]) -> dict[str, float]:
    """``normalize_mean: true`` of docs/decay.md: each multiplier over their mean."""
    mean = sum(multipliers.values()) / len(multipliers)
    return {name: value / mean for name, value in multipliers.items()}


def awd_average(before: float, gradient_norm: float, weight_norm: float) -> float:
    """``kind: awd``, 0.1·(average so far) + 0.9·‖∇‖/‖w‖ of the whole model (Ghiasi et al. 2023)."""
    return 0.1 * before + 0.9 * gradient_norm / weight_norm


def rank_target_decays(ranks: list[float], rates: list[float], base: float) -> list[float]:
    """``kind: rank_target``, λ before each update by the law of docs/decay.md.

    y = ln(L/B) of the bulk B and the learned part L changes by 2·λ·η and a drift; λ takes it to
    its goal in the time that is left. For target 0.3, threshold 0.5, until 0.5.

    Args:
        ranks: pseudo-ranks measured before each update.
        base: λ of the recipe.
    """
    total = sum(rates)
    spent = [sum(rates[:step]) / total for step in range(len(rates))]
    places = [math.log(max(0.5 - rank, 0.01) / 0.5) for rank in ranks]
    goal = math.log((0.5 - 0.31) / 0.5)
    decays: list[float] = []
    drift, used = math.nan, base
    for step, place in enumerate(places):
        if step:
            passed = spent[step] - spent[step - 1]
            observed = (place - places[step - 1]) / passed - 2 * used * total
            keep = math.exp(-passed / 0.05)
            drift = observed if math.isnan(drift) else keep * drift + (1 - keep) * observed
        left = max(0.5 - spent[step], 0.2)
        wanted = ((goal - place) / left - (0.0 if math.isnan(drift) else drift)) / (2 * total)
        used = min(max(wanted, 2.5 / total / 1000), 2.5 / total)
        decays.append(used)
    return decays

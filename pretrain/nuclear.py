"""The subgradient of the nuclear norm of a product, from its factors alone."""

from __future__ import annotations

import torch
from torch import Tensor

_TOLERANCE = 1e-6
"""Singular values below this share of the largest count as zero, where any contraction is a
subgradient; 0 is taken."""


def nuclear_subgradient(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """∂‖A·Bᵀ‖_*/∂A = U Vᵀ B and ∂/∂B = V Uᵀ A, with A·Bᵀ = U Σ Vᵀ.

    From the QR decompositions A = Q_A R_A, B = Q_B R_B and the small R_A R_Bᵀ = U' Σ V'ᵀ:
    U Vᵀ B = Q_A U' V'ᵀ R_B. Where the factors balance (AᵀA = BᵀB) these are A and B themselves:
    weight decay with the same λ (Lemma 3.2 of the paper).

    Args:
        a: ``[..., d_out, r]``.
        b: ``[..., d_in, r]``.

    Returns:
        Both gradients, in the shapes and dtypes of ``a`` and ``b``.
    """
    left, upper_a = torch.linalg.qr(a.float())
    right, upper_b = torch.linalg.qr(b.float())
    u, sigma, vh = torch.linalg.svd(upper_a @ upper_b.mT, full_matrices=False)
    alive = sigma > _TOLERANCE * sigma[..., :1].clamp_min(torch.finfo(torch.float32).tiny)
    polar = (u * alive[..., None, :].to(u.dtype)) @ vh
    return (left @ (polar @ upper_b)).to(a.dtype), (right @ (polar.mT @ upper_a)).to(b.dtype)

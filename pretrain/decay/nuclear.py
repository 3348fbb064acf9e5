"""The subgradient of the nuclear norm of a product, from its factors only."""

from __future__ import annotations

import torch
from torch import Tensor

_TOLERANCE = 1e-6
"""Singular values below this share of the largest count as zero. There, any contraction is a
subgradient, and 0 is used."""


def nuclear_subgradient(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """∂‖A·Bᵀ‖_*/∂A = U Vᵀ B and ∂/∂B = V Uᵀ A, with A·Bᵀ = U Σ Vᵀ.

    From the QR decompositions A = Q_A R_A, B = Q_B R_B and the small R_A R_Bᵀ = U' Σ V'ᵀ:
    U Vᵀ B = Q_A U' V'ᵀ R_B. If the factors balance (AᵀA = BᵀB), these are A and B themselves:
    weight decay with the same λ (Lemma 3.2 of the paper).

    Args:
        a: ``[..., d_out, r]``.
        b: ``[..., d_in, r]``.

    Returns:
        Both gradients, in the shapes and dtypes of ``a`` and ``b``; 0 for a pair that is not
        finite, which would make the decomposition fail for all.
    """
    left, upper_a = torch.linalg.qr(a.float())
    right, upper_b = torch.linalg.qr(b.float())
    core = upper_a @ upper_b.mT
    finite = core.isfinite().all(-1).all(-1)[..., None, None]
    u, sigma, vh = torch.linalg.svd(torch.where(finite, core, 0.0), full_matrices=False)
    alive = sigma > _TOLERANCE * sigma[..., :1].clamp_min(torch.finfo(torch.float32).tiny)
    polar = (u * alive[..., None, :].to(u.dtype)) @ vh
    for_a, for_b = left @ (polar @ upper_b), right @ (polar.mT @ upper_a)
    zero = for_a.new_zeros(())
    return (
        torch.where(finite, for_a, zero).to(a.dtype),
        torch.where(finite, for_b, zero).to(b.dtype),
    )

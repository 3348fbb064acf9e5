"""Spectra of a product A·Bᵀ from its factors, without ever forming the product.

The factors are tall (width x head), so all computations use head x head matrices: the Gram matrices
AᵀA = L_A L_Aᵀ and BᵀB = L_B L_Bᵀ in float64, and the singular values of L_Aᵀ L_B, which are those
of A·Bᵀ. L is the Cholesky factor, or V Λ^½ of the eigendecomposition if a matrix is singular to
working precision. If cancellation between the factors costs digits (ρ = σ₁(A)σ₁(B)/σ₁(ABᵀ) is
large), QR decompositions are used instead.

These are pure functions of tensors: no distributed code, no model.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_RHO_LIMIT = 1e4
"""Above this the error of the Gram form, ~ε·ρ², may exceed 1e-8 σ₁."""
_SLACK = 1e-6
"""Relative slack of the cumulative threshold, so that ties count as reached."""
_AT_ONCE = 1 << 13
"""Number of rows of factors that a thread handles at once, so that float64 copies stay in cache."""


@dataclass(frozen=True)
class ProductStatistics:
    """Statistics of W = A·Bᵀ; every field has the batch shape ``[...]`` unless stated."""

    singular_values: Tensor
    """``[..., n]`` float64, descending, n = min(d_out, d_in, r)."""
    pseudo_rank: Tensor
    """Share of n needed to reach the threshold of Σσ (the paper's "rank")."""
    nuclear_norm: Tensor
    """‖W‖_* = Σσ."""
    frobenius_bound: Tensor
    """½(‖A‖² + ‖B‖²), never below the nuclear norm."""
    balance: Tensor
    """nuclear_norm / frobenius_bound, in [0, 1]; 0 for zero factors."""
    discrepancy: Tensor
    """‖AᵀA − BᵀB‖_F, zero at stationary points under decay (Lemma 3.2)."""
    theory_ceiling: Tensor
    """√‖AᵀA − BᵀB‖_* · ½(‖A‖_* + ‖B‖_*), never below bound − nuclear (Prop. B.4)."""
    frobenius_norm: Tensor
    """‖W‖_F = √Σσ²."""
    stable_rank: Tensor
    """Σσ² / σ₁²."""
    effective_rank: Tensor
    """exp of the entropy of σ/Σσ (Roy & Vetterli 2007)."""
    participation_ratio: Tensor
    """(Σσ)² / Σσ²."""
    sigma_max: Tensor
    """σ₁."""
    nonfinite: Tensor
    """Whether a factor has a NaN or an infinity; the other fields are NaN there."""

    @property
    def gap(self) -> Tensor:
        """frobenius_bound − nuclear_norm ≥ 0."""
        return self.frobenius_bound - self.nuclear_norm

    def scalars(self) -> dict[str, Tensor]:
        """Every field but the spectrum, by name."""
        names = (field.name for field in fields(self))
        return {name: getattr(self, name) for name in names if name != "singular_values"}


def product_statistics(a: Tensor, b: Tensor, threshold: float = 0.95) -> ProductStatistics:
    """Statistics of A·Bᵀ for a batch of factor pairs.

    Args:
        a: ``[..., d_out, r]``, any float dtype.
        b: ``[..., d_in, r]``, same batch shape and r. For the products of a group that shares A
            (grouped-query attention), stack the Bᵢ along d_in.
        threshold: share of Σσ that defines the pseudo-rank.

    Returns:
        float64 statistics, on the CPU for factors on any device; a pair with a NaN or an infinity
        gives NaN only for itself.

    Raises:
        ValueError: if the shapes do not match.
    """
    if a.dim() < 2 or b.dim() < 2 or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"factors [..., d_out, r] and [..., d_in, r] expected, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )
    batch = a.shape[:-2]
    flat = [factor.detach().reshape(-1, *factor.shape[-2:]) for factor in (a, b)]
    measured = _by_threads if a.device.type == "cpu" else _by_host
    parts = measured(flat[0], flat[1], threshold)
    columns = {
        field.name: torch.cat([getattr(part, field.name) for part in parts])
        for field in fields(ProductStatistics)
    }
    return ProductStatistics(
        **{name: x.reshape((*batch, *x.shape[1:])) for name, x in columns.items()}
    )


Rows = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A function of a boolean mask over the pairs: their factors, float64 on the CPU."""


def _by_threads(a: Tensor, b: Tensor, threshold: float) -> list[ProductStatistics]:
    """Statistics of ``[heads, d, r]`` pairs on the CPU, some rows at a time."""

    def measured(a: Tensor, b: Tensor) -> ProductStatistics:
        a, b = a.double(), b.double()
        width = min(a.shape[-2], b.shape[-2])
        return _of_grams(a.mT @ a, b.mT @ b, lambda pairs: (a[pairs], b[pairs]), width, threshold)

    return _in_threads(measured, [a, b], _AT_ONCE // max(1, a.shape[-2]))


def _by_host(a: Tensor, b: Tensor, threshold: float) -> list[ProductStatistics]:
    """Statistics of pairs on another device: it makes the Gram matrices, and the CPU's threads
    solve the small problems, which a GPU would solve one after another."""
    grams = [wide.mT @ wide for wide in (a.double(), b.double())]
    numbers = torch.arange(len(a))

    def measured(gram_a: Tensor, gram_b: Tensor, part: Tensor) -> ProductStatistics:
        def rows(pairs: Tensor) -> tuple[Tensor, Tensor]:
            chosen = part[pairs].to(a.device)
            return a[chosen].cpu().double(), b[chosen].cpu().double()

        return _of_grams(gram_a, gram_b, rows, min(a.shape[-2], b.shape[-2]), threshold)

    hosts = [gram.cpu() for gram in grams]
    return _in_threads(measured, [*hosts, numbers], len(a))  # as few parts as there are threads


def _of_grams(
    gram_a: Tensor, gram_b: Tensor, rows: Rows, width: int, threshold: float
) -> ProductStatistics:
    """Statistics of pairs from AᵀA and BᵀB, ``[heads, r, r]`` float64.

    Args:
        rows: gives the factors of pairs whose Gram matrices are not accurate enough.
        width: the smaller number of rows of a factor.
    """
    finite = _trace(gram_a).isfinite() & _trace(gram_b).isfinite()  # sums of all squares
    if not bool(finite.all()):
        # One bad head must not make LAPACK fail for the whole batch.
        gram_a, gram_b = (torch.where(finite[:, None, None], g, 0.0) for g in (gram_a, gram_b))
    roots_a, roots_b = _roots(gram_a), _roots(gram_b)
    sigma = torch.linalg.svdvals(_factor(gram_a).mT @ _factor(gram_b))
    sigma = _repair_cancellation(rows, sigma, roots_a[..., -1] * roots_b[..., -1])
    sigma = sigma[..., :width]
    difference = gram_a - gram_b
    spread = torch.linalg.eigvalsh(difference).abs().sum(-1)
    return _statistics(
        sigma,
        bound=(_trace(gram_a) + _trace(gram_b)) / 2,
        discrepancy=torch.linalg.matrix_norm(difference),
        ceiling=spread.sqrt() * (roots_a.sum(-1) + roots_b.sum(-1)) / 2,
        finite=finite,
        threshold=threshold,
    )


def _trace(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1)


def _roots(gram: Tensor) -> Tensor:
    """Singular values of the factor, ascending."""
    eigenvalues: Tensor = torch.linalg.eigvalsh(gram)
    return eigenvalues.clamp_min(0.0).sqrt()


def _factor(gram: Tensor) -> Tensor:
    """L with L Lᵀ = gram."""
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(gram)
    singular = failed != 0
    if bool(singular.any()):
        values, vectors = torch.linalg.eigh(gram[singular])
        factor[singular] = vectors * values.clamp_min(0.0).sqrt()[..., None, :]
    return factor


def _repair_cancellation(rows: Rows, sigma: Tensor, product: Tensor) -> Tensor:
    """Recompute by QR the heads whose factors nearly cancel (product = σ₁(A)σ₁(B))."""
    doubtful = product > _RHO_LIMIT * sigma[..., 0]
    doubtful &= product > 0
    if not bool(doubtful.any()):
        return sigma
    sigma = sigma.clone()
    upper_a, upper_b = (torch.linalg.qr(factor, mode="r").R for factor in rows(doubtful))
    exact = torch.linalg.svdvals(upper_a @ upper_b.mT)
    repaired = torch.zeros_like(sigma[doubtful])
    repaired[..., : exact.shape[-1]] = exact
    sigma[doubtful] = repaired
    return sigma


def _statistics(
    sigma: Tensor,
    bound: Tensor,
    discrepancy: Tensor,
    ceiling: Tensor,
    finite: Tensor,
    threshold: float,
) -> ProductStatistics:
    nuclear, squares = sigma.sum(-1), sigma.square().sum(-1)
    largest = sigma[..., 0]
    shares = sigma / _nonzero(nuclear)[..., None]
    entropy = -torch.special.xlogy(shares, shares).sum(-1)
    is_nonzero = nuclear > 0

    def valid(values: Tensor, zero_when_empty: bool = False) -> Tensor:
        if zero_when_empty:
            values = torch.where(is_nonzero, values, 0.0)
        return torch.where(finite, values, torch.nan)

    return ProductStatistics(
        singular_values=torch.where(finite[..., None], sigma, torch.nan),
        pseudo_rank=valid(pseudo_rank(sigma, threshold)),
        nuclear_norm=valid(nuclear),
        frobenius_bound=valid(bound),
        balance=valid(nuclear / _nonzero(bound)),
        discrepancy=valid(discrepancy),
        theory_ceiling=valid(ceiling),
        frobenius_norm=valid(squares.sqrt()),
        stable_rank=valid(squares / _nonzero(largest.square()), zero_when_empty=True),
        effective_rank=valid(entropy.exp(), zero_when_empty=True),
        participation_ratio=valid(nuclear.square() / _nonzero(squares), zero_when_empty=True),
        sigma_max=valid(largest),
        nonfinite=~finite,
    )


def _nonzero(values: Tensor) -> Tensor:
    return torch.where(values > 0, values, 1.0)


def pseudo_rank(sigma: Tensor, threshold: float = 0.95) -> Tensor:
    """k/n, where k leading singular values are needed to reach ``threshold`` of their sum.

    Args:
        sigma: ``[..., n]`` float64, descending.

    Returns:
        ``[...]`` float64; 0 where all singular values are 0.
    """
    total = sigma.sum(-1, keepdim=True)
    reached = sigma.cumsum(-1) >= threshold * total * (1 - _SLACK)
    count = sigma.shape[-1] - reached.sum(-1) + 1
    return torch.where(total[..., 0] > 0, count.double() / sigma.shape[-1], 0.0)


@dataclass(frozen=True)
class PairStatistics:
    """Statistics per rotary frequency pair, to which the balance law applies
    (docs/statistics.md)."""

    rope_pair_balance: Tensor
    """Σ‖A_p‖‖B_p‖ / ½Σ(‖A_p‖² + ‖B_p‖²) over pairs p: 1 at equilibrium."""
    rope_pair_discrepancy: Tensor
    """√Σ(‖A_p‖² − ‖B_p‖²)²: falls as exp(−2λt) under gradient flow."""
    rope_pairs_alive: Tensor
    """Pseudo-rank of the pair strengths ‖A_p‖‖B_p‖: the share of pairs in use."""


def pair_statistics(
    a: Tensor, b: Tensor, rotary_dim: int, threshold: float = 0.95
) -> PairStatistics:
    """Statistics of rotary frequency pairs (j, j + rotary_dim/2) of the QK product.

    Args:
        a: ``[..., d_out, r]`` and
        b: ``[..., d_in, r]``: as in `product_statistics`; for a group, the Bᵢ stacked.
        rotary_dim: number of leading columns that rotate.
    """
    norm_a, norm_b = (_pair_norms(factor, rotary_dim) for factor in (a, b))
    squares_a, squares_b = norm_a.square(), norm_b.square()
    strength = norm_a * norm_b
    bound = (squares_a + squares_b).sum(-1) / 2
    ordered = strength.sort(-1, descending=True).values
    finite = strength.isfinite().all(-1)
    alive = pseudo_rank(torch.where(finite[..., None], ordered, 0.0), threshold)
    return PairStatistics(
        rope_pair_balance=strength.sum(-1) / _nonzero(bound),
        rope_pair_discrepancy=(squares_a - squares_b).square().sum(-1).sqrt(),
        rope_pairs_alive=torch.where(finite, alive, torch.nan),
    )


def _pair_norms(factor: Tensor, rotary_dim: int) -> Tensor:
    columns = factor.detach().double().square().sum(-2)[..., :rotary_dim].cpu()
    half = rotary_dim // 2
    return (columns[..., :half] + columns[..., half:]).sqrt()


def _in_threads(work: Callable[..., T], batches: list[Tensor], chunk: int) -> list[T]:
    """Apply ``work`` to ``chunk`` entries of the batches at a time, in order.

    There is one thread per core, because LAPACK gains nothing from more.

    Args:
        batches: CPU tensors with the same first dimension.
        chunk: at least 1 is used, and at most what leaves work for every thread.
    """
    threads = torch.get_num_threads()
    count = len(batches[0])
    chunk = max(1, min(chunk, -(-count // threads)))
    pieces = list(zip(*(batch.split(chunk) for batch in batches), strict=True))
    if threads == 1 or len(pieces) < 2:
        return [work(*piece) for piece in pieces]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(lambda piece: work(*piece), pieces))
    finally:
        torch.set_num_threads(threads)  # new threads would start with the value that was set last

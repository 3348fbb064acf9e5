"""Statistics of products against float64 SVDs of the dense product, and against theory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import pretrain.spectra
from pretrain.spectra import pair_statistics, product_statistics, pseudo_rank


def factors_with(sigma: torch.Tensor, d: int, seed: int, share: str) -> tuple[Any, ...]:
    """A, B with A·Bᵀ of the given singular values, the ill-conditioning shared or all in B."""
    g = torch.Generator().manual_seed(seed)
    r = len(sigma)
    u, _ = torch.linalg.qr(torch.randn(d, r, generator=g, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(d, r, generator=g, dtype=torch.float64))
    q, _ = torch.linalg.qr(torch.randn(r, r, generator=g, dtype=torch.float64))
    left = sigma.sqrt() if share == "shared" else torch.ones_like(sigma)
    right = torch.where(left > 0, sigma / left.clamp_min(1e-300), 0.0)
    return (u * left) @ q, (v * right) @ q


def dense(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    values: torch.Tensor = torch.linalg.svdvals(a.double() @ b.double().mT)[..., : a.shape[-1]]
    return values


SPECTRA = {
    "flat": torch.ones(32, dtype=torch.float64),
    "to 1e-2": torch.logspace(0, -2, 32, dtype=torch.float64),
    "to 1e-6": torch.logspace(0, -6, 32, dtype=torch.float64),
    "rank 8": torch.cat([torch.ones(8), torch.zeros(24)]).double(),
    "rank 1": torch.cat([torch.ones(1), torch.zeros(31)]).double(),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("share", ["shared", "one"])
@pytest.mark.parametrize("scale", [1.0, 1e-10, 1e8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_accuracy(spectrum: str, share: str, scale: float, dtype: torch.dtype) -> None:
    a, b = factors_with(SPECTRA[spectrum], 160, 1, share)
    a, b = (a * scale).to(dtype), b.to(dtype)
    found = product_statistics(a, b)
    wanted = dense(a, b)
    assert (found.singular_values - wanted).abs().max() <= 1e-7 * wanted[0]
    assert found.singular_values.dtype == torch.float64
    assert abs(found.nuclear_norm - wanted.sum()) <= 1e-6 * wanted.sum()
    assert found.nuclear_norm <= found.frobenius_bound * (1 + 1e-12)
    assert found.gap <= found.theory_ceiling + 1e-7 * found.frobenius_bound


@pytest.mark.parametrize("rho", [1e2, 1e4, 1e6])
def test_cancelling_factors(rho: float) -> None:
    """Large directions of A meet small ones of B: the product is far below the factors' norms."""
    r = 16
    a, b = factors_with(torch.ones(r, dtype=torch.float64), 96, 2, "shared")
    stretch = torch.logspace(0, torch.log10(torch.tensor(rho)).item(), r, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64))
    a, b = a @ q * stretch, b @ q / stretch
    found, wanted = product_statistics(a, b), dense(a, b)
    assert (found.singular_values - wanted).abs().max() <= 1e-7 * wanted[0]


def test_statistics_by_hand() -> None:
    sigma = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    a, b = factors_with(sigma, 12, 3, "shared")
    found = product_statistics(a, b)
    by_hand = {
        "pseudo_rank": 1.0,  # 7/8 < 0.95
        "nuclear_norm": 8.0, "frobenius_norm": 22**0.5, "sigma_max": 4.0, "stable_rank": 22 / 16,
        "participation_ratio": 64 / 22, "balance": 1.0, "frobenius_bound": 8.0,
        "effective_rank": math.exp(-sum(s / 8 * math.log(s / 8) for s in sigma.tolist())),
        "discrepancy": 0.0, "theory_ceiling": 0.0,  # shared: balanced factors
        "nonfinite": False,
    }  # fmt: skip
    assert found.scalars().keys() == by_hand.keys(), "a statistic without a value by hand"
    for name, value in by_hand.items():
        assert found.scalars()[name].item() == pytest.approx(value, rel=1e-7, abs=1e-5), name
    assert product_statistics(a, b, 0.75).pseudo_rank == 0.5  # 6/8 reached exactly: inclusive
    assert product_statistics(a, b, 0.5).pseudo_rank == 0.25
    assert found.discrepancy < 1e-12
    expected = (a.square().sum() + b.square().sum()) / 2
    torch.testing.assert_close(found.frobenius_bound, expected)
    other = product_statistics(2 * a, b)
    wanted = torch.linalg.matrix_norm(4 * a.T @ a - b.T @ b)
    torch.testing.assert_close(other.discrepancy, wanted)


@pytest.mark.parametrize("n", [20, 40, 64, 100])
def test_ties_are_inclusive(n: int) -> None:
    eye = torch.eye(n, dtype=torch.float64)
    k = -(-95 * n // 100)
    assert product_statistics(eye, eye).pseudo_rank == k / n
    assert pseudo_rank(torch.ones(n, dtype=torch.float64)) == k / n


def test_bad_heads_stay_alone() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(4, 40, 8), torch.randn(4, 40, 8)
    clean = product_statistics(a, b)
    a[1, 3, 2] = float("nan")
    b[2, 0, 0] = float("inf")
    found = product_statistics(a, b)
    assert found.nonfinite.tolist() == [False, True, True, False]
    for name, values in found.scalars().items():
        if name != "nonfinite":
            assert values[1:3].isnan().all(), name
            torch.testing.assert_close(values[[0, 3]], clean.scalars()[name][[0, 3]])
    assert found.singular_values[1:3].isnan().all()


def test_zeros_and_shapes() -> None:
    zero = product_statistics(torch.zeros(2, 10, 4), torch.randn(2, 10, 4))
    for name, values in zero.scalars().items():
        assert not values.float().isnan().any(), name
        if name not in ("frobenius_bound", "discrepancy", "theory_ceiling"):
            assert (values == 0).all(), name
    wide = product_statistics(torch.randn(3, 5, 9), torch.randn(3, 7, 9))
    assert wide.singular_values.shape == (3, 5)
    half = product_statistics(torch.randn(6, 4).bfloat16(), torch.randn(6, 4).bfloat16())
    assert half.singular_values.dtype == torch.float64
    with pytest.raises(ValueError, match="expected"):
        product_statistics(torch.randn(6, 4), torch.randn(6, 3))


def test_ceiling_holds_at_random() -> None:
    """Prop. B.4 on factors of every scale and shape of imbalance."""
    torch.manual_seed(1)
    for exponent in range(-6, 7, 2):
        a = torch.randn(50, 24, 6) * 10.0**exponent
        b = torch.randn(50, 24, 6) * torch.logspace(0, exponent / 3, 6)
        found = product_statistics(a, b)
        assert (found.gap >= -1e-9 * found.frobenius_bound).all()
        assert (found.gap <= found.theory_ceiling * (1 + 1e-9)).all()


def descend(
    a: torch.Tensor, b: torch.Tensor, target: torch.Tensor, rate: float, decay: float, steps: int
) -> tuple[Any, ...]:
    """Gradient descent on ½‖ABᵀ − D‖² + λ/2(‖A‖² + ‖B‖²)."""
    for _ in range(steps):
        g = a @ b.T - target
        a, b = a - rate * (g @ b + decay * a), b - rate * (g.T @ a + decay * b)
    return a, b


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.4])
def test_discrepancy_falls_as_theory_says(decay: float) -> None:
    """‖AᵀA − BᵀB‖ falls as (1 − ηλ)²ᵏ, to the order of η² (Lemma B.1, discrete)."""
    g = torch.Generator().manual_seed(4)
    a, b = (torch.randn(5, 5, generator=g, dtype=torch.float64) for _ in range(2))
    target = torch.diag(torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0], dtype=torch.float64))
    errors = []
    for rate in (4e-3, 2e-3):
        steps = round(2.0 / rate)
        start = product_statistics(a, b).discrepancy
        end = product_statistics(*descend(a, b, target, rate, decay, steps)).discrepancy
        errors.append(abs(end / start / (1 - rate * decay) ** (2 * steps) - 1).item())
    assert errors[1] < 0.02
    assert errors[1] < 0.65 * errors[0]  # first order in η over a fixed time: η² a step


def test_equilibrium_is_soft_thresholding() -> None:
    """σ → max(s − λ, 0), nuclear norm = bound (Lemma 3.2)."""
    g = torch.Generator().manual_seed(5)
    a, b = (0.5 * torch.randn(5, 5, generator=g, dtype=torch.float64) for _ in range(2))
    levels = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2], dtype=torch.float64)
    a, b = descend(a, b, torch.diag(levels), 0.05, 0.3, 8000)
    found = product_statistics(a, b)
    expected = (levels - 0.3).clamp_min(0)
    torch.testing.assert_close(found.singular_values, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.nuclear_norm, found.frobenius_bound, rtol=1e-6, atol=0)


def test_group_is_the_stacked_product() -> None:
    """For heads that share a key, AᵀA − ΣBᵢᵀBᵢ, as the stacked factors give it."""
    torch.manual_seed(2)
    key, queries = torch.randn(20, 4).double(), torch.randn(3, 20, 4).double()
    found = product_statistics(key, queries.reshape(60, 4))
    total = sum(q.T @ q for q in queries)
    wanted = torch.linalg.matrix_norm(key.T @ key - total)
    torch.testing.assert_close(found.discrepancy, wanted)


def test_rotary_pairs() -> None:
    torch.manual_seed(3)
    a, b = torch.randn(30, 8).double(), torch.randn(30, 8).double()
    a[:, [1, 5]] = 0  # pair 1 of rotary_dim 8 is dead
    found = pair_statistics(a, b, 8)
    norms = [[f[:, [j, j + 4]].norm() for j in range(4)] for f in (a, b)]
    strength = sum(x * y for x, y in zip(*norms, strict=True))
    bound = sum(x * x + y * y for x, y in zip(*norms, strict=True)) / 2
    torch.testing.assert_close(found.rope_pair_balance, strength / bound)
    wanted = sum((x * x - y * y) ** 2 for x, y in zip(*norms, strict=True)) ** 0.5
    torch.testing.assert_close(found.rope_pair_discrepancy, wanted)
    assert found.rope_pairs_alive == 0.75


@pytest.mark.parametrize("kind", ["usual", "bad", "cancelling"])
def test_the_host_solves_a_devices_small_problems(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of a GPU, on the CPU: Gram matrices first, then parts of them in threads."""
    draw = torch.Generator().manual_seed(5)
    a, b = (torch.randn(11, 40, 6, generator=draw, dtype=torch.float64) for _ in range(2))
    if kind == "bad":
        a[3, 0, 0], b[7, 1, 2] = torch.nan, torch.inf
    if kind == "cancelling":
        stretch = torch.logspace(0, 6, 6, dtype=torch.float64)
        orthogonal = torch.linalg.qr(torch.randn(6, 6, generator=draw, dtype=torch.float64)).Q
        a[[2, 9]] = torch.linalg.qr(a[[2, 9]]).Q @ orthogonal * stretch
        b[[2, 9]] = torch.linalg.qr(a[[2, 9]]).Q @ orthogonal / stretch
    wanted = product_statistics(a.view(1, 11, 40, 6), b.view(1, 11, 40, 6)).scalars()
    monkeypatch.setattr("pretrain.spectra._by_threads", pretrain.spectra._by_host)
    found = product_statistics(a.view(1, 11, 40, 6), b.view(1, 11, 40, 6)).scalars()
    for name, values in wanted.items():
        assert values.shape == found[name].shape == (1, 11)
        torch.testing.assert_close(found[name], values, rtol=1e-12, atol=1e-12, equal_nan=True)

"""The report's tests, intervals and corrections against closed forms and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pretrain.report.compare import holm, t_test


def closed_form(t: float, freedom: int) -> float:
    """Two-sided p of Student's t: integrals that have a closed form."""
    if freedom == 1:
        return 1 - 2 * math.atan(t) / math.pi
    if freedom == 2:
        return 1 - t / math.sqrt(2 + t * t)
    angle = math.atan(t / math.sqrt(3))
    return 1 - 2 * (angle + math.sin(angle) * math.cos(angle)) / math.pi


@pytest.mark.parametrize("seed", range(30))
def test_t_against_scipy_and_closed_forms(seed: int) -> None:
    from scipy import stats  # a second

    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 9))
    scale = 10.0 ** rng.uniform(-200, 200)
    a, b = rng.normal(0, scale, n), rng.normal(0.5 * scale * rng.random(), scale, n)
    found = t_test(list(zip(a.tolist(), b.tolist(), strict=True)))
    wanted = stats.ttest_rel(a / scale, b / scale)
    low, high = wanted.confidence_interval(0.95)
    assert found.n == n
    assert found.mean / scale == pytest.approx((a / scale - b / scale).mean(), rel=1e-9)
    assert found.p == pytest.approx(wanted.pvalue, rel=1e-9)
    assert (found.low / scale, found.high / scale) == pytest.approx((low, high), rel=1e-9)
    if n <= 4:
        gaps = a / scale - b / scale
        t = abs(gaps.mean()) / (gaps.std(ddof=1) / math.sqrt(n))
        assert found.p == pytest.approx(closed_form(t, n - 1), rel=1e-9)


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        [(1.0, 2.0)],
        [(1.0, 2.0), (1.0, 2.0)],
        [(0.5, 0.5)] * 4,
        [(0.1 + 0.2, 0.2), (0.3, 0.2)],  # equal up to rounding
        [(127 / 384, 128 / 384), (63 / 384, 64 / 384), (0.25 - 1 / 384, 0.25)],
        [(1e304, 1e304 / 2)] * 2,
        [(1e-300, 2e-300)] * 3,
    ],
)
def test_no_variance_no_test(pairs: list[tuple[float, float]]) -> None:
    found = t_test(pairs)
    assert found.n == len(pairs)
    assert all(math.isnan(value) for value in (found.low, found.high, found.p))
    assert math.isnan(found.mean) == (not pairs)


def test_p_is_never_zero() -> None:
    """Neither a huge t nor many pairs make it 0."""
    rng = np.random.default_rng(0)
    for n in (2, 3, 50, 400):
        a = 1.0 + 1e-9 * rng.normal(size=n)
        found = t_test([(value, 0.0) for value in a.tolist()])
        assert 0 < found.p < 1e-4 and found.low <= found.mean <= found.high


@pytest.mark.parametrize("seed", range(30))
def test_holm_by_closed_testing(seed: int) -> None:
    """p of a hypothesis: the largest Bonferroni p over all sets that contain it."""
    rng = np.random.default_rng(seed)
    p = [float(x) if rng.random() > 0.2 else math.nan for x in rng.random(6) ** 3]
    known = [i for i, value in enumerate(p) if not math.isnan(value)]
    for index, corrected in enumerate(holm(p)):
        if math.isnan(p[index]):
            assert math.isnan(corrected)
            continue
        others = [i for i in known if i != index]
        worst = 0.0
        for mask in range(1 << len(others)):
            chosen = [index, *(o for bit, o in enumerate(others) if mask >> bit & 1)]
            worst = max(worst, min(1.0, len(chosen) * min(p[i] for i in chosen)))
        assert corrected == pytest.approx(worst)

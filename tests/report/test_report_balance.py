"""Balance and other statistics of the rank table that a report takes over."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.factors import AttentionShape, Factors
from pretrain.config.run import RanksConfig
from pretrain.offline.ranks import print_ranks
from pretrain.ranks.probe import layer_rows
from pretrain.ranks.table import add_ranks, read_ranks


def test_balance_has_one_meaning() -> None:
    """Log, `ranks` and report: of groups where heads share keys."""
    from pretrain.offline.ranks import means
    from pretrain.ranks.probe import summary

    rows = [
        {"layer": 0, "product": product, "level": level, "head": head, "pseudo_rank": 0.5,
         "balance": value, "discrepancy": 1.0, "frobenius_bound": 2.0, "nonfinite": False}
        for product in ("qk", "vp")
        for level, count, value in (("head", 4, 0.887), ("group", 2, 0.930))
        for head in range(count)
    ]  # fmt: skip
    for product in ("qk", "vp"):
        key = f"balance_{product}"
        assert summary(rows)[key] == pytest.approx(means(rows)[key]) == pytest.approx(0.930)
    heads = [row for row in rows if row["level"] == "head"]
    assert summary(heads)["balance_qk"] == pytest.approx(0.887)


def rows_of(scale: float, normed: bool = False, bad: bool = False) -> list[dict[str, Any]]:
    """A layer's rows from random factors of a scale, perhaps with a weight that is not finite."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator)

    factors = Factors(draw(2, 1, 4, 8), draw(2, 4, 8), draw(2, 4, 8), draw(2, 1, 8, 4))
    if bad:
        factors.query[1, 0, 2, 3] = math.nan
    shape = AttentionShape(1, 2, 2, 4, 8, rotary_dim=0, qk_norm=normed)
    return layer_rows(factors, [0, 1], 0, shape, None, RanksConfig(spectra=True))


def test_spectra_of_small_weights_are_stored(tmp_path: Path) -> None:
    """Weights of 1e-30 have products of 1e-60, which float32 does not hold."""
    small, usual = rows_of(1e-30), rows_of(1.0)
    add_ranks(tmp_path, 0, [{"step": 0, **row} for row in small], RanksConfig())
    stored = {(r["product"], r["head"]): r for r in read_ranks(tmp_path)}
    for one in usual:
        found = np.array(stored[one["product"], one["head"]]["singular_values"])
        wanted = np.array(one["singular_values"])
        np.testing.assert_allclose(found * 1e60, wanted, rtol=1e-5)
        assert (found > 0).all()


def test_why_a_statistic_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    """QK-norm is said of models that have it, lost weights of those that lost some."""
    for normed, bad in ((False, False), (True, False), (False, True), (True, True)):
        print_ranks([{**row, "step": 0} for row in rows_of(1.0, normed, bad)], as_json=False)
        out = capsys.readouterr().out
        assert ("normalised" in out) == normed
        assert ("1 of 4 products have weights that are not finite" in out) == bad
        assert ("layer 0, qk, head 1" in out) == bad

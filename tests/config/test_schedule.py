"""Learning rates as functions of the step."""

from __future__ import annotations

from itertools import pairwise

import pytest

from pretrain.config.recipe import parse_config
from pretrain.config.schedule import exposure, learning_rate


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_shape(kind: str) -> None:
    rates = [learning_rate(step, 100, 2.0, kind, 10, 0.1, 20) for step in range(100)]
    assert rates[0] == pytest.approx(2.0 / 11) and rates[9] == pytest.approx(20 / 11)
    assert rates[10] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(2.0 if kind == "constant" else 0.2)
    assert all(b <= a + 1e-12 for a, b in pairwise(rates[10:]))
    if kind == "wsd":
        assert rates[79] == 2.0 and rates[81] < 2.0
    if kind == "cosine":
        middle = learning_rate(10 + 89 // 2, 100, 2.0, kind, 10, 0.0)
        assert middle == pytest.approx(1.0, abs=0.02)


def test_recipe_shares_and_steps() -> None:
    for warmup, steps in ((0.05, 10), (30, 30), (0, 0)):
        optimizer = {"schedule": {"warmup": warmup}}
        config = parse_config({"train": {"steps": 200}, "optimizer": optimizer})
        assert config.warmup_steps == steps
    assert exposure([0.1, 0.2], 3.0) == pytest.approx(0.9)

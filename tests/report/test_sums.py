"""Sums of figures from files: as exact as they can be, and never an error."""

from __future__ import annotations

import math
import random
from fractions import Fraction

from pretrain.report.sums import mean, total

ODD = [math.nan, math.inf, -math.inf, 1e308, 1.7e308, -1.7e308, 5e-324, 0.0]


def test_sums_of_any_numbers() -> None:
    for seed in range(2000):
        draw = random.Random(seed)
        values = [draw.choice([*ODD, draw.gauss(0, 1)]) for _ in range(draw.randrange(6))]
        found = total(values)
        infinite = {value for value in values if math.isinf(value)}
        if any(math.isnan(value) for value in values) or len(infinite) == 2:
            assert math.isnan(found)
        elif infinite:
            assert found in infinite
        else:
            exact = sum(map(Fraction, values), Fraction(0))
            if abs(exact) > Fraction(1.79e308):
                assert math.isinf(found) and (found > 0) == (exact > 0)
            else:
                assert abs(Fraction(found) - exact) <= math.ulp(found)
        again = found / max(1, len(values))
        assert mean(values) == again or math.isnan(again)

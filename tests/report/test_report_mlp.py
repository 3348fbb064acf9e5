"""λ of the MLP in a report: as applied, whatever is logged of it and however it is coupled."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.recipe import parse_config
from pretrain.report.runs import RunData
from tests.tools import base_recipe


def run_of(recipe: dict[str, Any], decays: list[float], every: int) -> RunData:
    config = parse_config(recipe)
    steps = len(decays)
    rows = [
        {"step": step, "learning_rate": config.learning_rate(step - 1),
         "weight_decay": {"mlp_in": decays[step - 1], "mlp_out": decays[step - 1]}}
        for step in range(1, steps + 1) if step == 1 or step % every == 0 or step == steps
    ]  # fmt: skip
    return RunData(Path("x"), config, [], rows, [], None, None, None)


@pytest.mark.parametrize("coupling", ["lr", "lr2", "none"])
@pytest.mark.parametrize("every", [1, 10])
def test_lambda_of_the_mlp_is_what_was_applied(coupling: str, every: int) -> None:
    recipe = deepcopy(base_recipe(Path("data")))
    steps = 100
    recipe["train"]["steps"] = steps
    recipe["optimizer"]["schedule"] = {"kind": "cosine", "warmup": 10}
    recipe["optimizer"]["weight_decay"]["coupling"] = {"mlp": coupling}
    decays = [0.1 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]
    config = parse_config(recipe)
    peak = config.optimizer.learning_rate
    forms: dict[str, Callable[[float], float]] = {
        "lr": lambda x: x,
        "lr2": lambda x: x * x / peak,
        "none": lambda _: 1.0,
    }
    rates = [forms[coupling](config.learning_rate(step)) for step in range(steps)]
    wanted = math.fsum(r * d for r, d in zip(rates, decays, strict=True)) / math.fsum(rates)
    found = run_of(recipe, decays, every).mlp_decay
    assert found == pytest.approx(wanted, rel=1e-9 if every == 1 else 5e-3)
    assert run_of(recipe, [0.3] * steps, every).mlp_decay == 0.3

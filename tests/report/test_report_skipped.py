"""λ as applied, in a report on a run that skipped updates."""

from __future__ import annotations

import math
import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from models.config import GPTConfig
from models.gpt import whole_model
from models.roles import QK, VO, Role
from pretrain.config.recipe import parse_config
from pretrain.decay.control import DecayControl
from pretrain.decay.plan import plan_decay
from pretrain.decay.sites import coupled_rate, site_of
from pretrain.report.runs import RunData
from tests.tools import base_recipe

STEPS = 40
SHAPES: list[dict[str, Any]] = [
    {"shape": "window", "start": 10, "stop": 30, "first": 3.0, "last": 0.0},
    {"shape": "linear", "first": 1.0, "last": 0.1},
    {"shape": "step", "start": 0.5, "first": 0.2, "last": 2.0},
]


@pytest.mark.parametrize("coupling", ["lr", "lr2"])
@pytest.mark.parametrize("seed", range(6))
def test_skipped_updates_do_not_count(coupling: str, seed: int) -> None:
    """Σ rate·λ / Σ rate over the updates that were taken, of attention and of the MLP."""
    rng = random.Random(seed)
    skipped = sorted(rng.sample(range(2, STEPS), rng.randint(0, 12)))
    recipe = deepcopy(base_recipe(Path("data")))
    recipe["model"]["vocabulary_size"] = 300
    recipe["train"]["steps"] = STEPS
    recipe["optimizer"]["schedule"] = {"kind": "cosine", "warmup": 5}
    roles = {"roles": ["attention", "mlp"], "kind": "schedule"}
    policies = [{**roles, **rng.choice(SHAPES)}]
    recipe["optimizer"]["weight_decay"] |= {"coupling": coupling, "policies": policies}
    config = parse_config(recipe)
    infos = whole_model(GPTConfig(**recipe["model"]))
    control = DecayControl(config, plan_decay(infos, config.optimizer.weight_decay))
    site = {info.role: site_of(info) for info in infos if info.layer == 0}
    rows, logged, rates, taken = [], [], [], []

    def measure(step: int) -> None:
        for product, (a, b) in (("qk", QK), ("vp", VO)):
            books = control.books()
            factors = {
                f"{name}_{side}": getattr(books[f"{role.value}[0]"], name)
                for side, role in (("a", a), ("b", b))
                for name in ("decay", "exposure")
            }
            rows.append({"step": step, "layer": 0, "product": product, "level": "head", **factors})

    measure(0)
    for step in range(STEPS):
        control.begin(step, config.learning_rate(step))
        if step + 1 in skipped:
            continue
        used = control.commit()
        rate = coupled_rate(coupling, config.learning_rate(step), config.optimizer.learning_rate)
        rates.append(rate)
        taken.append({role: rate * used[site[role]].decay for role in (Role.QUERY, Role.MLP_IN)})
        decays = {role.value: used[site[role]].decay for role in (Role.MLP_IN, Role.MLP_OUT)}
        logged.append({"step": step + 1, "weight_decay": decays})
        if (step + 1) % 7 == 0:
            measure(step + 1)
    measure(STEPS)
    found = RunData(Path("x"), config, rows, logged, [], None, None, None, skipped=tuple(skipped))
    for role, value in ((Role.QUERY, found.decay), (Role.MLP_IN, found.mlp_decay)):
        wanted = math.fsum(one[role] for one in taken) / math.fsum(rates)
        assert value == pytest.approx(wanted, rel=1e-9)

"""The exposure that a sweep asks for is the one that its runs apply."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.gpt import whole_model
from pretrain.config.recipe import Config, parse_config, with_values
from pretrain.decay.control import DecayControl
from pretrain.decay.plan import plan_decay
from pretrain.decay.sites import Applied, Site
from pretrain.errors import UsageError
from pretrain.sweep.exposure import exposure_per_decay

KEY = "optimizer.weight_decay.attention"
MODEL = {
    "num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "context": 8,
    "vocabulary_size": 50,
}  # fmt: skip


def recipe(decay: dict[str, Any], **more: Any) -> Config:
    values = {
        "model": MODEL,
        "train": {"steps": 60},
        "optimizer": {"learning_rate": 3e-3, "weight_decay": decay, **more},
    }
    return parse_config(values)


def applied(config: Config, first: int) -> dict[str, float]:
    """What the books of a run say at its end, by site."""
    plan = plan_decay(whole_model(config.model), config.optimizer.weight_decay)
    control = DecayControl(config, plan)
    for step in range(first, config.train.steps):
        control.begin(step, config.learning_rate(step))
        control.commit()
    return {label: book.exposure for label, book in control.books().items()}


def any_schedule(draw: random.Random, roles: list[str]) -> dict[str, Any]:
    start = draw.choice([0.0, 0.2, 10, 0.5])
    return {
        "kind": "schedule", "roles": roles, "start": start,
        "shape": draw.choice(["linear", "cosine", "step", "warmup", "window"]),
        "stop": draw.choice([None, 0.8, 55]), "first": draw.choice([1.0, 0.3, 2.0]),
        "last": draw.choice([0.01, 0.1, 1.5]),
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_the_asked_exposure_is_applied(seed: int) -> None:
    draw = random.Random(seed)
    word = draw.choice(["attention", "qk", "query", "mlp", "default"])
    roles = [word] if word != "default" else ["mlp", "embedding", "position", "attention"]
    decay: dict[str, Any] = {"default": 0.1, "norm": 0.0}
    decay["policies"] = [any_schedule(draw, roles) for _ in range(draw.randrange(3))]
    decay["policies"] += [any_schedule(draw, ["norm"])] * draw.randrange(2)
    schedule = {
        "kind": draw.choice(["cosine", "linear", "constant", "wsd"]),
        "warmup": draw.choice([0, 0.1, 7]),
    }
    config = recipe(decay, schedule=schedule)
    key, first = f"optimizer.weight_decay.{word}", draw.choice([0, 20])
    per_decay = exposure_per_decay(config, key, first, "here")
    wanted = draw.choice([0.05, 1.0, 2.5])
    chosen = with_values(config, {key: wanted / per_decay}, "here")
    now, before = applied(chosen, first), applied(config, first)
    moved = [label for label in now if now[label] != before[label]]
    assert moved and all(now[label] == pytest.approx(wanted, rel=1e-6) for label in moved)


@pytest.mark.parametrize(
    ("policies", "culprit"),
    [
        ([{"kind": "alpha", "roles": ["attention"], "min_eigenvalues": 4}], "by measurements"),
        ([{"kind": "awd", "roles": ["qk"]}], "query, key"),
        ([{"kind": "rank_target", "roles": ["vo"], "target": 0.5}], "by measurements"),
        ([{"kind": "schedule", "roles": ["qk"], "stop": 0.2}], "different exposures"),
        ([{"kind": "schedule", "roles": ["attention"], "first": 0, "last": 0}], "always 0"),
    ],
)
def test_an_exposure_that_cannot_be_set_is_refused(policies: list[Any], culprit: str) -> None:
    with pytest.raises(UsageError, match=culprit):
        exposure_per_decay(recipe({"policies": policies}), KEY, 0, "here")


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("first", [0, 31])
def test_layers_with_different_decay_are_refused(
    layer: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever layer a policy treats differently, from the first step on or later."""
    now = DecayControl.now

    def differing(self: DecayControl, site: Site) -> Applied:
        found = now(self, site)
        other = site[1] == layer and self._step >= first
        return replace(found, decay=2 * found.decay) if other else found

    config = with_values(recipe({}), {"model.num_layers": 3}, "here")
    exposure_per_decay(config, KEY, 0, "here")
    monkeypatch.setattr(DecayControl, "now", differing)
    with pytest.raises(UsageError, match="layers of query different λ"):
        exposure_per_decay(config, KEY, 0, "here")


def test_a_key_that_nothing_takes_is_refused() -> None:
    narrower = {"query": 0.1, "key": 0.1, "value": 0.1, "attention_output": 0.1}
    with pytest.raises(UsageError, match="no parameter"):
        exposure_per_decay(recipe(narrower), KEY, 0, "here")


def test_a_window_counts_in_a_sweep(tmp_path: Path, data: Path) -> None:
    from pretrain.sweep.config import load_sweep
    from tests.tools import write_sweep

    window = [{"kind": "schedule", "shape": "window", "roles": ["attention"], "stop": 0.2}]
    path = write_sweep(
        tmp_path, data, grid={}, exposure={KEY: [1.0]}, baseline=None, seeds=1,
        set={"optimizer.weight_decay.policies": window},
    )  # fmt: skip
    (task,) = load_sweep(path).tasks
    model = task.config.model.model_copy(update={"vocabulary_size": 50})
    found = applied(task.config.model_copy(update={"model": model}), 0)
    assert found["query[0]"] == pytest.approx(1.0, rel=1e-4)

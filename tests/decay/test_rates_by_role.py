"""`optimizer.learning_rate_by`: η of a role, and the decay that follows it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.config import GPTConfig
from models.gpt import whole_model
from models.roles import ALIASES, Role
from pretrain.cluster.dry_run import _exposures
from pretrain.config.recipe import parse_config, with_values
from pretrain.decay.by_role import rate_factors
from pretrain.decay.control import DecayControl
from pretrain.decay.plan import plan_decay
from pretrain.decay.sites import label
from pretrain.errors import UsageError
from pretrain.report.read_run import load_run
from pretrain.runs.metrics import read_metrics
from pretrain.sweep.exposure import exposure_per_decay
from tests.decay.test_control import build
from tests.decay.test_decay_applied import CASES, LAMBDAS, RATES, case
from tests.tools import base_recipe, run, run_workers, weights_of, write_recipe

KEY = "optimizer.learning_rate_by"
FACTORS = {"attention": 0.5, "query": 0.25, "mlp": 2.0, "norm": 3.0, "embedding": 0.0}
PRESENT = frozenset(Role) - {Role.MLP_GATE}


def by_hand(factors: dict[str, float], role: Role) -> float:
    """The factor of the narrowest word that covers a role."""
    words = [word for word in factors if role in ALIASES[word]]
    return factors[min(words, key=lambda word: len(ALIASES[word]))] if words else 1.0


def built(factors: dict[str, float], decay: dict[str, Any]) -> tuple[Any, DecayControl]:
    config, _ = build(decay)
    config = with_values(config, {KEY: factors}, "test")
    infos = whole_model(config.model)
    return config, DecayControl(config, plan_decay(infos, config.optimizer.weight_decay))


def test_the_most_specific_word_wins() -> None:
    draw = random.Random(5)
    for _ in range(300):
        words = draw.sample(sorted(set(ALIASES) - {"mlp_gate"}), draw.randint(0, 6))
        factors = {word: draw.choice([0.0, 0.25, 2.0]) for word in words}
        found = rate_factors(factors, PRESENT)
        assert found == {role: by_hand(factors, role) for role in PRESENT}, factors


@pytest.mark.parametrize(
    ("factors", "culprit"),
    [
        ({"mlp_gate": 2.0}, "this model has no 'mlp_gate'"),
        ({"attention.query": 0.5}, "'attention.query' is not a role; known: attention, qk"),
        ({"query": -1.0}, "greater than or equal to 0"),
        ({"query": float("inf")}, "finite number"),
        ({"query": "fast"}, "valid number"),
    ],
)
def test_what_fits_no_model_is_refused(factors: dict[str, Any], culprit: str) -> None:
    with pytest.raises(UsageError, match=KEY) as error:
        built(factors, {})
    assert culprit in str(error.value) and "\n" not in str(error.value)


def test_rates_and_exposures() -> None:
    """What decays at the rate η decays at the role's own; a rate of 1 stays 1."""
    rates: dict[str, Callable[[float, float], float]] = {
        "lr": lambda factor, rate: factor * rate,
        "lr2": lambda factor, rate: (factor * rate) ** 2 / (factor * 0.01) if factor else 0.0,
        "none": lambda factor, rate: 1.0,
    }
    for coupling, wanted in rates.items():
        decay = {"default": 0.005, "coupling": coupling}
        config, control = built(FACTORS, decay)
        sums = dict.fromkeys(control.base, 0.0)
        for step in range(config.train.steps):
            rate = config.learning_rate(step)
            control.begin(step, rate)
            for site, applied in control.commit().items():
                factor = by_hand(FACTORS, site[0])
                assert control.rate_of(site[0]) == factor * rate
                assert applied.rate == pytest.approx(wanted(factor, rate), rel=1e-12, abs=0)
                sums[site] += applied.decay * wanted(factor, rate)
        books = control.books()
        assert all(books[label(site)].exposure == pytest.approx(sums[site]) for site in sums)
        plan = plan_decay(whole_model(config.model), config.optimizer.weight_decay)
        shown = _exposures(control, plan.groups, config)
        for group, found in zip(plan.groups, shown, strict=True):
            assert found is not None
            assert found[0] == pytest.approx(sums[group.role, group.parameters[0].layer])


def test_a_sweep_finds_the_decay_of_an_exposure() -> None:
    model = GPTConfig(num_layers=2, hidden_size=32, num_attention_heads=4, context=16,
                      vocabulary_size=300)  # fmt: skip
    config = parse_config({"model": model.model_dump(), "train": {"steps": 30}})
    halved = with_values(config, {f"{KEY}.attention": 0.5}, "test")
    key = "optimizer.weight_decay.attention"
    whole = exposure_per_decay(config, key, 0, "sweep")
    assert exposure_per_decay(halved, key, 0, "sweep") == pytest.approx(whole / 2)
    apart = with_values(config, {f"{KEY}.query": 0.5}, "test")
    with pytest.raises(UsageError, match="give each role its own key"):
        exposure_per_decay(apart, key, 0, "sweep")


GRIDS = [
    (1, (1, 1, 0), "fp32", "adamw"), (1, (1, 1, 1), "bf16", "lion"), (1, (1, 1, 3), "fp32", "sgd"),
    (2, (1, 1, 1), "fp32", "muon"), (2, (1, 2, 1), "fp32", "sgd"),
    (2, (2, 1, 2), "bf16", "adamw"),
]  # fmt: skip
ALL = [
    (count, *grid, name)
    for count, grids in CASES.items()
    for grid in grids
    for name in ("adamw", "sgd", "lion", "muon")
]


def decay_case(
    data: Path, grid: tuple[int, int, int], precision: str, name: str, decay: dict[str, Any]
) -> dict[str, Any]:
    rates = {role.value: [by_hand(FACTORS, role) * rate for rate in RATES] for role in PRESENT}
    one = case(data, grid, precision, LAMBDAS, rates=rates)
    one["recipe"]["optimizer"] |= {"name": name, "learning_rate_by": FACTORS}
    one["recipe"]["optimizer"]["weight_decay"] |= decay
    if name == "sgd":  # without momentum, decay in the gradient is the same product
        one["recipe"]["optimizer"]["momentum"] = 0.0
        one["recipe"]["optimizer"]["gradient_clipping"] = 0.0
        one["recipe"]["optimizer"]["weight_decay"]["form"] = {"attention": "l2"}
    return one


@pytest.mark.slow
@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.long), 2,
                                       pytest.param(4, marks=pytest.mark.long)])  # fmt: skip
def test_zero_gradients(
    data: Path, tmp_path: Path, processes: int, request: pytest.FixtureRequest
) -> None:
    """Under every optimizer, ZeRO stage and pipeline every tensor is Π(1 − m η λ) times its
    start, by the optimizer's own decay and by the hook's."""
    grids = ALL if request.config.getoption("--long") else GRIDS
    cases = [
        decay_case(data, grid, precision, name, decay)
        for count, grid, precision, name in grids
        if count == processes
        for decay in ({}, {"form": {"vo": "cautious", "mlp": "adadecay"}})[: 1 + (grids is ALL)]
    ]
    for one, answer in zip(cases, run_workers(processes, "decay", cases, tmp_path), strict=True):
        recipe = one["recipe"]
        assert answer["worst"] < 1e-6, (recipe["grid"], recipe["optimizer"], answer)


@pytest.mark.slow
def test_a_run_moves_each_role_at_its_rate(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under sgd a first update is in proportion to the rate; a factor of 0 freezes a role."""
    values = base_recipe(data)
    values["train"]["steps"] = 1
    values["evaluation"]["at_end"] = "none"
    values["optimizer"] |= {"name": "sgd", "momentum": 0.0, "gradient_clipping": 0.0,
                            "schedule": {"kind": "constant", "warmup": 0}}  # fmt: skip
    recipe = str(write_recipe(tmp_path / "recipe.yaml", values))
    ends = {}
    for name, words in (
        ("none", ["optimizer.learning_rate=0"]), ("one", []),
        ("two", [f"{KEY}.query=0.5", f"{KEY}.mlp=0"]),
    ):  # fmt: skip
        assert run(monkeypatch, "train", recipe, "--out", str(tmp_path / name), *words) == 0
        ends[name] = weights_of(tmp_path / name)
    capsys.readouterr()
    for key, start in ends["none"].items():
        moved, halved = ends["one"][key] - start, ends["two"][key] - start
        factor = 0.5 if ".query.weight" in key else 0.0 if ".mlp." in key and "bias" not in key \
            else 1.0  # fmt: skip
        assert halved == pytest.approx(factor * moved, rel=1e-4, abs=1e-8), key
    first = read_metrics(tmp_path / "two")[0]
    assert first["learning_rate"] == values["optimizer"]["learning_rate"]
    whole, less = (load_run(tmp_path / name) for name in ("one", "two"))
    assert less.exposure == pytest.approx((3 + 0.5) / 4 * whole.exposure)
    assert less.decay == pytest.approx(whole.decay)
    assert run(monkeypatch, "train", recipe, "--out", str(tmp_path / "one"), f"{KEY}.query=2") == 2
    assert f"holds a run with {KEY}.query=null, the recipe says 2.0" in capsys.readouterr().err

"""λ before, while and after a policy acts, over random recipes; the books against what is taken."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from models.config import GPTConfig
from models.gpt import whole_model
from models.roles import ALIASES, ATTENTION
from pretrain.config.recipe import Config, parse_config
from pretrain.config.schedule import decay_multiplier
from pretrain.decay.control import DecayControl
from pretrain.decay.nuclear import nuclear_subgradient
from pretrain.decay.plan import plan_decay
from pretrain.decay.policies.alpha import Alpha, eigenvalues, hill_exponent
from pretrain.decay.policies.awd import Adaptive
from pretrain.decay.policies.rank_target import RankController
from pretrain.decay.sites import coupled_rate, label
from pretrain.errors import UsageError

STEPS = 40
ROLES = [role.value for role in ATTENTION] + ["mlp_in", "mlp_out", "embedding"]


def build(decay: dict[str, Any], **more: Any) -> tuple[Config, DecayControl]:
    model = {
        "num_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "context": 16,
        "vocabulary_size": 300,
    }
    values = {
        "model": model,
        "train": {"steps": STEPS},
        "optimizer": {"learning_rate": 0.01, "weight_decay": decay},
        **more,
    }
    config = parse_config(values)
    infos = whole_model(GPTConfig(**model))
    return config, DecayControl(config, plan_decay(infos, config.optimizer.weight_decay))


def rows(control: DecayControl, rank: float) -> list[dict[str, Any]]:
    """A measurement with one rank everywhere."""
    layers = {layer for _, layer in control.base if layer is not None}
    return [
        {"layer": layer, "product": product, "level": "head", "pseudo_rank": rank}
        for layer in layers
        for product in ("qk", "vp")
    ]


def controllers(control: DecayControl) -> list[RankController]:
    """The rank targets of a recipe."""
    return [one for one in control.policies if isinstance(one, RankController)]


POLICIES: dict[str, dict[str, Any]] = {
    "alpha": {"kind": "alpha", "min_eigenvalues": 8},
    "awd": {"kind": "awd"},
    "rank_target": {"kind": "rank_target", "target": 0.5},
}
SCHEDULES = [
    {"shape": shape, "start": start, "stop": stop, "first": 2.0, "last": 0.5}
    for shape in ("linear", "cosine", "step", "warmup", "window")
    for start, stop in ((0.0, 1.0), (0.2, 0.7), (4, 30))
]


def drawn(rng: random.Random) -> dict[str, Any]:
    """λ for some words, and policies that may go together."""
    words = rng.sample(["default", "attention", "qk", "vo", *ROLES], rng.randint(1, 6))
    decay: dict[str, Any] = {word: round(rng.uniform(0, 4), 3) for word in words}
    policies = [dict(POLICIES[name]) for name in rng.sample(sorted(POLICIES), rng.randint(0, 1))]
    for one in rng.sample(SCHEDULES, rng.randint(0, 2)):
        schedule = {"kind": "schedule", "roles": [rng.choice(["attention", "mlp", "qk"])], **one}
        policies.insert(rng.randint(0, len(policies)), schedule)
    return {**decay, "policies": policies, "coupling": rng.choice(["lr", "lr2"])}


@pytest.mark.parametrize("seed", range(60))
def test_before_a_policy_acts_the_recipe_holds(seed: int) -> None:
    """λ is the recipe's times the schedules', at every site, until something was measured."""
    rng = random.Random(seed)
    config, control = build(drawn(rng))
    policies = config.optimizer.weight_decay.policies
    schedules: list[Any] = [one for one in policies if one.kind == "schedule"]
    begins = min((one.config.start for one in controllers(control)), default=1.0)
    rates = [
        coupled_rate(config.optimizer.weight_decay.coupling, config.learning_rate(step), 0.01)  # type: ignore[arg-type]
        for step in range(STEPS)
    ]
    for step in range(STEPS):
        spent, total = sum(rates[:step]), sum(rates)
        if controllers(control) and spent / total >= begins:
            break
        for one in controllers(control):
            one.observe(rows(control, rng.random()), step)
        control.begin(step, config.learning_rate(step))
        for site, base in control.base.items():
            wanted = base
            for timed in schedules:
                if any(site[0] in ALIASES[word] for word in timed.roles):
                    wanted *= decay_multiplier(
                        step, STEPS, timed.shape, timed.start, timed.stop, timed.first, timed.last
                    )
            assert control.now(site).decay == pytest.approx(wanted, rel=1e-12), label(site)
        control.commit()


def test_rank_target_begins_with_its_share_of_the_rate() -> None:
    """Both factors have the recipe's own λ, and one λ from the measurement at `start` on."""
    config, control = build({"query": 3.0, "key": 1.0, "policies": [POLICIES["rank_target"]]})
    (one,) = controllers(control)
    queries = [(site, base) for site, base in control.base.items() if site[0].value == "query"]
    began, spent = None, 0.0
    total = sum(config.learning_rate(step) for step in range(STEPS))
    for step in range(STEPS):
        one.observe(rows(control, 0.8), step)
        control.begin(step, config.learning_rate(step))
        used = {control.now(site).decay for site, _ in queries}
        if spent / total < 0.15:
            assert used == {3.0}
        else:
            began = began or step
            assert {control.now(site).decay for site in control.base
                    if site[0].value in ("query", "key")} == used  # fmt: skip
        control.commit()
        spent += config.learning_rate(step)
    assert began is not None and 0 < began < STEPS


@pytest.mark.parametrize("threshold", [0.01, 0.5, 0.95, 0.999999, 1 - 1e-12, 1.0])
@pytest.mark.parametrize("denominator", ["head", "model"])
@pytest.mark.parametrize("target", [1e-6, 0.3, 1.0])
def test_rank_target_at_its_boundaries(threshold: float, denominator: str, target: float) -> None:
    """Any rank gives a λ within the bounds, or the recipe is refused in one line."""
    decay = {"policies": [{"kind": "rank_target", "target": target, "start": 0, "every": 1}]}
    ranks = {"threshold": threshold, "denominator": denominator}
    if threshold == 1:
        with pytest.raises(UsageError, match=r"^ranks\.threshold: "):
            build(decay, ranks=ranks)
        return
    config, control = build(decay, ranks=ranks)
    (one,) = controllers(control)
    found = (0.0, 1.0, threshold, math.nan, 1 / 8, math.inf, 0.5, math.nan)
    said: list[str] = []
    for step, rank in enumerate(found):
        before = {site: control.now(site).decay for site in control.base}
        said += one.observe(rows(control, rank), step)
        control.begin(step, config.learning_rate(step))
        for site in control.base:
            decay_now = control.now(site).decay
            if site[0] not in ATTENTION or not math.isfinite(rank):
                assert decay_now == before[site]
            else:
                assert one.minimum <= decay_now <= one.maximum
    blind = [line for line in said if "no finite rank" in line]
    assert len(blind) == 3 * 6, said  # three gaps, six loops


def test_rank_target_counts_the_coupled_rate() -> None:
    """Without η the largest λ is still what gives the run an exposure of 2.5."""
    for coupling in ("lr", "lr2", "none"):
        decay = {"default": 0.005, "coupling": coupling, "policies": [POLICIES["rank_target"]]}
        config, control = build(decay)
        (one,) = controllers(control)
        total = 0.0
        for step in range(STEPS):
            control.begin(step, config.learning_rate(step))
            total += control.now(next(iter(control.base))).rate
        assert one.maximum * total == pytest.approx(2.5)
    mixed = {"default": 0.005, "coupling": {"qk": "none"}, "policies": [POLICIES["rank_target"]]}
    with pytest.raises(UsageError, match=r"coupling: rank_target needs one coupling"):
        build(mixed)


def test_a_saved_state_does_not_bring_an_old_decay_back() -> None:
    """A fork with another λ: its own until control begins, also for the estimate of the drift."""
    policy = {"kind": "rank_target", "target": 0.5}
    _, old = build({"attention": 0.5, "policies": [policy]})
    _, new = build({"attention": 3.0, "policies": [policy]})
    controllers(old)[0].observe(rows(old, 0.9), 0)
    new.restore(old.state(), same_policies=True)
    assert {new.now(site).decay for site in new.base if site[0] in ATTENTION} == {3.0}
    state = controllers(new)[0].state()
    assert {one["base"] for one in state.values()} == {3.0}
    assert all(one["place"] is not None for one in state.values())  # what was measured stays


# --- measurements that are not finite -------------------------------------------------------


def test_what_is_not_finite_moves_nothing() -> None:
    _, control = build({"attention": 0.5, "policies": [{"kind": "awd", "roles": ["qk"]}]})
    (awd,) = (one for one in control.policies if isinstance(one, Adaptive))
    for ratio in (0.2, math.nan, math.inf, 0.0):
        control.begin(0, 0.01)
        control.commit(ratio)
    assert awd.mean == pytest.approx(0.1 * 0.9 * 0.2)
    saved = awd.state()
    _, again = build({"attention": 0.5, "policies": [{"kind": "awd", "roles": ["qk"]}]})
    again.policies[0].restore(saved)
    site = next(site for site in control.base if site[0].value == "query")
    assert again.now(site).decay == control.now(site).decay == 0.5 * awd.mean
    for bad in (math.nan, math.inf, -math.inf):
        weight = torch.randn(6, 9)
        weight[2, 3] = bad
        assert math.isnan(hill_exponent(eigenvalues(weight)))
    _, control = build({"attention": 0.5, "policies": [POLICIES["alpha"]]})
    (alpha,) = (one for one in control.policies if isinstance(one, Alpha))
    names = [label(site) for site in control.base if site[0] in ATTENTION]
    alpha.observe({name: (math.nan, math.inf, 2.0)[i % 3] for i, name in enumerate(names)}, 0)
    assert {control.now(site).decay for site in control.base if site[0] in ATTENTION} == {0.5}


def test_nuclear_subgradient_of_a_head_that_is_not_finite() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 10, 4, generator=generator) for _ in range(2))
    wanted = nuclear_subgradient(a, b)
    for bad in (math.nan, math.inf):
        damaged = a.clone()
        damaged[1, 2, 3] = bad
        found = nuclear_subgradient(damaged, b)
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one[[0, 2]], other[[0, 2]]) and not one[1].any()


# --- the books ------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_exposure_is_what_nuclear_steps_take(every: int) -> None:
    """Steps apart from each other count as what they took, not as λ in every update."""
    decay: dict[str, Any] = {"attention": 0.5, "mlp": 0.3, "form": {"attention": "nuclear"}}
    if every > 1:
        decay["nuclear_every"] = every
    config, control = build(decay)
    taken = dict.fromkeys(control.base, 0.0)
    left = dict.fromkeys(control.base, 1.0)
    for step in range(STEPS):
        rate = config.learning_rate(step)
        control.begin(step, rate)
        control.commit()
        for site, base in control.base.items():
            share = base * rate
            if site[0] in ATTENTION:
                share = 0.0 if step % every else every * share
            taken[site] += share
            left[site] *= 1 - share
    for site in control.base:
        book = control.books()[label(site)]
        assert book.exposure == pytest.approx(taken[site], rel=1e-12)
        assert book.retention == pytest.approx(left[site], rel=1e-12)
        assert book.decay == control.base[site]


def test_the_controller_is_told_its_parts() -> None:
    """A policy of the recipe is a policy of the control, in its order."""
    _, control = build(
        {"policies": [POLICIES["rank_target"], {"kind": "schedule", "roles": ["mlp"]}]}
    )
    assert isinstance(control.policies[0], RankController) and len(control.policies) == 2

"""Computes the λ that gives a run a certain exposure Σηλ under the recipe's schedules."""

from __future__ import annotations

import math

from models.gpt import whole_model
from pretrain.config.recipe import Config, with_values
from pretrain.decay.control import DecayControl
from pretrain.decay.plan import plan_decay
from pretrain.decay.sites import KEY, Site
from pretrain.errors import UsageError

_PROBE = 2.0**-10
"""A λ that is small enough for every coupling, and by which division is exact."""
_LOOKS = 64
"""Steps at which all layers are compared; λ of the first and the last are at every step."""
_ANSWERS = 128
"""Placeholder for a vocabulary size that the data determines; λ does not depend on it."""


def exposure_per_decay(config: Config, key: str, first: int, source: str) -> float:
    """Exposure of a run for λ = 1 at a dotted key: Σ rate·(what schedules make of 1).

    Args:
        first: the step from which the run itself trains, after its trunk.
        source: the first part of messages.

    Raises:
        UsageError: if λ there depends on measurements, or differs between the key's roles or their
            layers.
    """
    if config.optimizer.weight_decay.coupling != "lr":
        raise UsageError(f"{source}: exposure: Σηλ is defined only for {KEY}.coupling=lr")
    control = _control(with_values(config, {key: _PROBE}, source))
    doubled = _control(with_values(config, {key: 2 * _PROBE}, source))
    of_role: dict[str, list[Site]] = {}
    for site, decay in control.base.items():
        if decay != doubled.base[site]:
            of_role.setdefault(site[0].value, []).append(site)
    sites = {role: layers[0] for role, layers in of_role.items()}
    if not sites:
        raise UsageError(f"{source}: exposure: no parameter takes its λ from {key}")
    measured = [role for role, site in sites.items() if control.is_adaptive(site[0])]
    if measured:
        raise UsageError(
            f"{source}: exposure: a policy changes λ of {', '.join(measured)} by measurements, "
            f"so no {key} gives a fixed exposure; give λ in grid: instead"
        )
    totals = dict.fromkeys(sites, 0.0)
    looks = {*range(first, config.train.steps, max(1, (config.train.steps - first) // _LOOKS))}
    for step in range(first, config.train.steps):
        control.begin(step, config.learning_rate(step))
        for role, site in sites.items():
            shrink = control.now(site).shrink
            layers = of_role[role] if step in looks else of_role[role][-1:]
            if any(control.now(layer).shrink != shrink for layer in layers):
                raise UsageError(
                    f"{source}: exposure: a policy gives the layers of {role} different λ, so no "
                    f"{key} gives all of them this exposure; give λ in grid: instead"
                )
            totals[role] += shrink
    if not all(totals.values()):
        none = [role for role, total in totals.items() if not total]
        raise UsageError(
            f"{source}: exposure: rate x λ of {', '.join(none)} is always 0; check "
            "optimizer.learning_rate and the schedules of λ"
        )
    least, most = min(totals.values()), max(totals.values())
    if not math.isclose(least, most, rel_tol=1e-9):
        parts = ", ".join(f"{role} {total / _PROBE:.4g}" for role, total in totals.items())
        raise UsageError(
            f"{source}: exposure: schedules give {key}=1 different exposures ({parts}); give each "
            "role its own key"
        )
    return most / _PROBE


def _control(config: Config) -> DecayControl:
    model = config.model
    if not model.vocabulary_size:
        model = model.model_copy(update={"vocabulary_size": _ANSWERS})
    plan = plan_decay(whole_model(model), config.optimizer.weight_decay)
    return DecayControl(config.model_copy(update={"model": model}), plan)

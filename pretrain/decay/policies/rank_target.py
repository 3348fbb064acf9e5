"""Trains at a given pseudo-rank: λ per layer, from a model of how rank responds to decay."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import Field

from models.roles import QK, VO, Role
from pretrain.decay.policy import Policy, PolicySection, Setting
from pretrain.decay.registry import POLICIES
from pretrain.decay.sites import KEY, Site
from pretrain.errors import UsageError

Loop = tuple[int, str]
"""A control loop: (layer, product)."""
_PRODUCTS = {**dict.fromkeys(QK, "qk"), **dict.fromkeys(VO, "vp")}
_EXPOSURE, _SPAN = 2.5, 1000.0
"""By default λ gives a whole run at most this exposure, and at least 1/_SPAN of it."""
_PATIENCE = 10
"""Number of measurements at a bound, still off the target, after which the bound is reported."""
_OFF = 0.05
_LEAST = 0.02
"""Least L/B that is distinguished from 0."""


class RankTarget(PolicySection):
    """Sets λ of each layer's query/key (value/output) to bring its pseudo-rank to a given value
    (`RankController`)."""

    roles: list[str] = Field(["qk", "vo"], min_length=1, description="qk, vo or attention")
    target: float = Field(gt=0, le=1, description="mean pseudo-rank of the layer's heads")
    minimum: float | None = Field(None, gt=0, description="least λ; empty: maximum / 1000")
    maximum: float | None = Field(
        None,
        gt=0,
        description="largest λ; empty: the λ that gives the whole run an exposure of 2.5",
    )
    every: int = Field(0, ge=0, description="steps between measurements; 0: 1/100 of the run")
    start: float = Field(0.15, ge=0, lt=1, description="share of Ση spent when control begins")
    until: float = Field(
        0.8, gt=0, le=1, description="share of Ση spent when the target should be reached"
    )
    horizon: float = Field(0.2, gt=0, le=1, description="share of Ση in which errors are corrected")
    memory: float = Field(0.05, gt=0, le=1, description="share of Ση over which drift is averaged")
    margin: float = Field(
        0.01, ge=0, description="aim this much above the target, because a fall cannot be undone"
    )

    def length_remarks(self, key: str, steps: int) -> Iterator[str]:
        if self.every >= steps:
            yield f"{key}.every: {self.every:,} steps in a run of {steps:,}: it never takes control"


@dataclass
class _State:
    """The state of a loop."""

    base: float
    """The recipe's λ, mean of both factors, which applies until the control begins."""
    decay: float = math.nan
    """λ now; NaN until the control begins."""
    time: float = math.nan
    place: float = math.nan
    drift: float = math.nan
    stuck: int = 0


@POLICIES.built_in("rank_target")
class RankController(Policy):
    """Sets λ of each layer's query/key and value/output so that their mean pseudo-rank is the
    target.

    A head's spectrum is approximately a flat bulk of mass B and a few learned directions of mass L.
    Then the pseudo-rank with threshold τ is r ≈ τ − (1 − τ)·L/B, and

        y = ln((τ − r)/(1 − τ)) = ln(L/B)

    changes with the exposure. Decay removes the bulk of the product at twice the rate of each
    factor: dy/ds = 2·λ·Ση + drift, where s is the share of the run's Ση that is spent, and the
    drift is the effect of training itself. The gain is therefore known. After every measurement,
    the drift is estimated from the last slope, and λ is set so that y reaches the target when s is
    ``until`` (afterwards: within ``horizon``, which holds it there). λ is kept between bounds. Bulk
    that was removed does not return, so for a rank below the target the controller can only use the
    least λ; therefore it aims a little above the target.

    (PI control of log λ on the rank itself was tried first, and oscillates: r responds to exposure
    exponentially, at first not at all and then too much.)
    """

    Config = RankTarget
    wants = "ranks"
    config: RankTarget

    def __init__(self, config: RankTarget, setting: Setting) -> None:
        """
        Raises:
            UsageError: if the settings exclude each other or the roles are not both factors of a
                product.
        """
        super().__init__(config, setting)
        rates = _rates(setting)
        _check_roles(setting.roles)
        if setting.threshold >= 1:
            raise UsageError(
                f"ranks.threshold: at {setting.threshold:g} the pseudo-rank counts every "
                "singular value and decay does not change it, so rank_target cannot control it; "
                "use 0.95"
            )
        self._spent = [0.0, *itertools.accumulate(rates)]
        self.maximum = config.maximum or _EXPOSURE / max(self._spent[-1], 1e-12)
        self.minimum = config.minimum or self.maximum / _SPAN
        if config.start >= config.until:
            raise UsageError(
                f"{KEY}.policies: rank_target.start {config.start:g} is not before until "
                f"{config.until:g}"
            )
        if self.minimum >= self.maximum:
            raise UsageError(
                f"{KEY}.policies: rank_target.minimum {self.minimum:g} is not below maximum "
                f"{self.maximum:g}"
            )
        self._threshold, self._unit = setting.threshold, setting.full_rank
        self._goal = self._place(config.target + config.margin * self._unit)
        self.every = config.every or max(1, setting.steps // 100)
        self._loops: dict[Loop, _State] = {}
        self._blind: set[Loop] = set()
        factors: dict[Loop, list[float]] = defaultdict(list)
        for (role, layer), decay in setting.base.items():
            if layer is not None:
                factors[layer, _PRODUCTS[role]].append(decay)
        for loop, decays in factors.items():
            self._loops[loop] = _State(sum(decays) / len(decays))

    def observe(self, measured: list[dict[str, Any]], step: int) -> list[str]:
        """Process the measurement after ``step`` updates (rows of `pretrain.ranks.probe.measure`).

        Returns:
            Messages for the user: loops that are stuck at a bound, or that could not be measured
            (once each).
        """
        time = self._spent[step] / max(self._spent[-1], 1e-12)
        messages = []
        for loop, state in sorted(self._loops.items()):
            ranks = [
                row["pseudo_rank"]
                for row in measured
                if (row["layer"], row["product"]) == loop and row["level"] == "head"
            ]
            rank = sum(ranks) / len(ranks) if ranks else math.nan
            head = f"rank target {self.config.target:g}: layer {loop[0]} {loop[1]}"
            if not math.isfinite(rank):
                if loop not in self._blind:
                    messages.append(f"{head} has no finite rank; its λ stays as it is")
                self._blind.add(loop)
                continue
            self._blind.discard(loop)
            bound = self._update(state, rank, time)
            if bound:
                messages.append(
                    f"{head} is at {rank:.3f} with λ at its {bound} "
                    f"{getattr(self, bound):.3g}; the target may be out of reach"
                )
        return messages

    def _place(self, rank: float) -> float:
        """y of a mean pseudo-rank."""
        missing = max(self._threshold - rank / self._unit, _LEAST * (1 - self._threshold))
        return math.log(missing / max(1 - self._threshold, 1e-9))

    def _update(self, state: _State, rank: float, time: float) -> str | None:
        """Make one step of a loop, and return the bound at which it is stuck, if any."""
        config, total = self.config, self._spent[-1]
        place = self._place(rank)
        passed = 0.0 if math.isnan(state.time) else time - state.time
        if passed > 0:
            used = state.base if math.isnan(state.decay) else state.decay
            drift = (place - state.place) / passed - 2 * used * total
            smooth = math.exp(-passed / config.memory)
            state.drift = (
                drift if math.isnan(state.drift) else smooth * state.drift + (1 - smooth) * drift
            )
        state.place, state.time = place, time
        if time < config.start:
            return None
        remaining = max(config.until - time, config.horizon)
        drift = 0.0 if math.isnan(state.drift) else state.drift
        exact = ((self._goal - place) / remaining - drift) / max(2 * total, 1e-12)
        state.decay = min(max(exact, self.minimum), self.maximum)
        clamped = not self.minimum < exact < self.maximum and abs(rank - config.target) > _OFF
        state.stuck = state.stuck + 1 if clamped and time > config.until else 0
        if state.stuck != _PATIENCE:
            return None
        return "minimum" if exact <= self.minimum else "maximum"

    def move(self, site: Site, decay: float, step: int) -> float:
        """λ of the site's loop; until its control begins, λ unchanged (the recipe's).

        What an earlier schedule made of the recipe's λ, it makes of the loop's.
        """
        role, layer = site
        if layer is None:
            return decay
        state, base = self._loops[layer, _PRODUCTS[role]], self.setting.base[site]
        if math.isnan(state.decay):
            return decay
        return state.decay * (decay / base) if base else state.decay

    def state(self) -> dict[str, Any]:
        """The state of the loops."""
        return {
            f"{layer}/{product}": {
                key: None if math.isnan(value) else value for key, value in asdict(state).items()
            }
            for (layer, product), state in self._loops.items()
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a saved state; the recipe's λ stays that of this recipe."""
        for key, saved in state.items():
            layer, _, product = key.partition("/")
            loop = int(layer), product
            values: dict[str, Any] = {k: math.nan if v is None else v for k, v in saved.items()}
            self._loops[loop] = _State(**{**values, "base": self._loops[loop].base})


def _rates(setting: Setting) -> list[float]:
    """The rate of every update of the run, which all roles of the policy must share."""
    couplings = {setting.coupling[role] for role in setting.roles}
    if len(couplings) > 1:
        raise UsageError(
            f"{KEY}.coupling: rank_target needs one coupling for its roles, not "
            f"{' and '.join(sorted(couplings))}"
        )
    role = min(setting.roles)
    return [setting.rate(role, step) for step in range(setting.steps)]


def _check_roles(roles: frozenset[Role]) -> None:
    for role in roles:
        if role not in _PRODUCTS:
            raise UsageError(
                f"{KEY}.policies: rank_target acts on qk, vo or attention, not on {role}"
            )
    for pair, word in ((QK, "qk"), (VO, "vo")):
        if 0 < len(roles.intersection(pair)) < 2:
            raise UsageError(
                f"{KEY}.policies: rank_target needs both factors of a product: write {word}"
            )

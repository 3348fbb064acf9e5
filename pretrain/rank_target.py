"""Train at a set pseudo-rank: PI control of log λ, layer by layer, on measured ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from models.roles import QK, VO, Role
from pretrain.config import Config
from pretrain.decay import KEY
from pretrain.decay_config import RankTarget
from pretrain.errors import UsageError

Loop = tuple[int, str]
"""A control loop: (layer, product)."""
_PRODUCTS = {**dict.fromkeys(QK, "qk"), **dict.fromkeys(VO, "vp")}
_EXPOSURE, _SPAN = 4.0, 1000.0
"""By default λ is at most what gives a whole run this exposure, and at least 1/_SPAN of that."""
_PATIENCE = 10
"""Measurements at a bound, still off the target, after which the bound is reported."""
_OFF = 0.05
_SMOOTH = 0.6
"""Share of the running slope of the rank that a new measurement leaves."""


@dataclass
class _State:
    """What a loop remembers."""

    log_decay: float
    first_time: float = math.nan
    first_rank: float = math.nan
    time: float = math.nan
    rank: float = math.nan
    slope: float = 0.0
    error: float = math.nan
    stuck: int = 0


class RankController:
    """λ of each layer's query/key and value/output, so that their mean pseudo-rank is the target.

    Time is the share s of the run's Ση that is spent, since decay acts through the exposure Σηλ.
    With error e = rank + lead·(d rank/ds) − reference at measurement k, in velocity form, which
    cannot wind up: log λ ← clip(log λ + K_p(e_k − e_{k−1}) + K_i e_k Δs, log min, log max).

    The reference goes in a straight line from the first measured rank to the target, over the
    ``ramp``. It must not hurry: decay takes the bulk of a spectrum, which training does not bring
    back, and the rank falls after that, as the learned directions grow. A controller that spends
    more exposure than the target needs cannot take it back; for the same reason λ is bounded by
    default, so that a whole run at the maximum has the exposure 4.
    """

    per_layer = True

    def __init__(
        self,
        config: RankTarget,
        roles: frozenset[Role],
        sites: Iterable[tuple[Role, int | None]],
        base: Mapping[tuple[Role, int | None], float],
        run: Config,
    ) -> None:
        _check_roles(roles)
        rates = [run.learning_rate(step) for step in range(run.train.steps)]
        self._spent = [0.0, *itertools.accumulate(rates)]
        self.maximum = config.maximum or _EXPOSURE / max(self._spent[-1], 1e-12)
        self.minimum = config.minimum or self.maximum / _SPAN
        if self.minimum >= self.maximum:
            raise UsageError(
                f"{KEY}.policies: rank_target.minimum {self.minimum:g} is not below maximum "
                f"{self.maximum:g}"
            )
        self.config, self.roles = config, roles
        self.every = config.every or max(1, run.train.steps // 100)
        self._loops: dict[Loop, _State] = {}
        for role, layer in sites:
            if layer is not None:
                start = min(max(base[role, layer], self.minimum), self.maximum)
                self._loops[layer, _PRODUCTS[role]] = _State(math.log(start))

    def observe(self, rows: list[dict[str, Any]], step: int) -> list[str]:
        """Take the measurement after ``step`` updates (rows of `pretrain.probe.measure`).

        Returns:
            What a person should know: loops that are stuck at a bound.
        """
        time = self._spent[step] / max(self._spent[-1], 1e-12)
        messages = []
        for loop, state in sorted(self._loops.items()):
            ranks = [
                row["pseudo_rank"]
                for row in rows
                if (row["layer"], row["product"]) == loop and row["level"] == "head"
            ]
            rank = sum(ranks) / len(ranks) if ranks else math.nan
            if math.isfinite(rank):
                bound = self._update(state, rank, time)
                if bound:
                    messages.append(
                        f"rank target {self.config.target:g}: layer {loop[0]} {loop[1]} is at "
                        f"{rank:.3f} with λ at its {bound} "
                        f"{getattr(self, bound):.3g}; the target may be out of reach"
                    )
        return messages

    def _update(self, state: _State, rank: float, time: float) -> str | None:
        """One step of a loop; returns the bound that has just proved to hold it, if any."""
        config = self.config
        if math.isnan(state.first_rank):
            state.first_rank, state.first_time = rank, time
        passed = 0.0 if math.isnan(state.time) else time - state.time
        if passed > 0:
            slope = (rank - state.rank) / passed
            state.slope = _SMOOTH * state.slope + (1 - _SMOOTH) * slope
        state.rank, state.time = rank, time
        error = rank + config.lead * state.slope - self._reference(state, time + config.lead)
        change = 0.0 if math.isnan(state.error) else error - state.error
        state.error = error
        low, high = math.log(self.minimum), math.log(self.maximum)
        wanted = state.log_decay + config.proportional * change + config.integral * error * passed
        state.log_decay = min(max(wanted, low), high)
        held = not low < wanted < high and abs(rank - config.target) > _OFF
        state.stuck = state.stuck + 1 if held and time > config.ramp else 0
        if state.stuck != _PATIENCE:
            return None
        return "minimum" if wanted <= low else "maximum"

    def _reference(self, state: _State, time: float) -> float:
        """The rank that is wanted at a time."""
        begun = state.first_time
        share = min(1.0, max(0.0, time - begun) / max(1e-9, self.config.ramp - begun))
        return state.first_rank + (self.config.target - state.first_rank) * share

    def move(self, site: tuple[Role, int | None], decay: float, step: int) -> float:
        """λ of the site's loop."""
        role, layer = site
        if layer is None:
            return decay
        return math.exp(self._loops[layer, _PRODUCTS[role]].log_decay)

    def state(self) -> dict[str, Any]:
        """What the loops remember."""
        return {
            f"{layer}/{product}": {
                key: None if math.isnan(value) else value for key, value in asdict(state).items()
            }
            for (layer, product), state in self._loops.items()
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        for key, saved in state.items():
            layer, _, product = key.partition("/")
            values = {name: math.nan if v is None else v for name, v in saved.items()}
            self._loops[int(layer), product] = _State(**values)


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

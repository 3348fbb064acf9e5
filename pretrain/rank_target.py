"""Train at a set pseudo-rank: PI control of log λ, layer by layer, on measured ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from models.roles import QK, VO, Role
from pretrain.config import Config
from pretrain.decay import KEY
from pretrain.decay_config import RankTarget
from pretrain.errors import UsageError

Loop = tuple[int, str]
"""A control loop: (layer, product)."""
_PRODUCTS = {**dict.fromkeys(QK, "qk"), **dict.fromkeys(VO, "vp")}
_PATIENCE = 10
"""Measurements at a bound, still off the target, after which the bound is reported."""
_OFF = 0.05


class RankController:
    """λ of each layer's query/key and value/output, so that their mean pseudo-rank is the target.

    With error e = rank − target at measurement k, in velocity form, which cannot wind up:
    log λ ← clip(log λ + K_p(e_k − e_{k−1}) + K_i e_k, log minimum, log maximum).
    Decay acts on rank through the exposure Σηλ, with delay: the proportional part damps it.
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
        if config.minimum >= config.maximum:
            raise UsageError(
                f"{KEY}.policies: rank_target.minimum {config.minimum:g} is not below maximum "
                f"{config.maximum:g}"
            )
        self.config, self.roles = config, roles
        self.every = config.every or max(1, run.train.steps // 100)
        self._log: dict[Loop, float] = {}
        self._error: dict[Loop, float] = {}
        self._stuck: dict[Loop, int] = {}
        for role, layer in sites:
            if layer is not None:
                start = min(max(base[role, layer], config.minimum), config.maximum)
                self._log[layer, _PRODUCTS[role]] = math.log(start)

    def observe(self, rows: list[dict[str, Any]]) -> list[str]:
        """Take one measurement (rows of `pretrain.probe.measure`).

        Returns:
            What a person should know: loops that are stuck at a bound.
        """
        config, messages = self.config, []
        for loop in sorted(self._log):
            ranks = [
                row["pseudo_rank"]
                for row in rows
                if (row["layer"], row["product"]) == loop and row["level"] == "head"
            ]
            rank = sum(ranks) / len(ranks) if ranks else math.nan
            if not math.isfinite(rank):
                continue
            error = rank - config.target
            change = error - self._error.get(loop, error)
            wanted = self._log[loop] + config.proportional * change + config.integral * error
            low, high = math.log(config.minimum), math.log(config.maximum)
            self._log[loop] = min(max(wanted, low), high)
            self._error[loop] = error
            stuck = abs(error) > _OFF and not low < wanted < high
            self._stuck[loop] = self._stuck.get(loop, 0) + 1 if stuck else 0
            if self._stuck[loop] == _PATIENCE:
                bound = "minimum" if wanted <= low else "maximum"
                messages.append(
                    f"rank target {config.target:g}: layer {loop[0]} {loop[1]} is at {rank:.3f} "
                    f"with λ at its {bound} {getattr(config, bound):g}; it may be out of reach"
                )
        return messages

    def move(self, site: tuple[Role, int | None], decay: float, step: int) -> float:
        """λ of the site's loop."""
        role, layer = site
        return decay if layer is None else math.exp(self._log[layer, _PRODUCTS[role]])

    def state(self) -> dict[str, Any]:
        """Logarithms of λ, last errors and counts at a bound."""
        return {
            f"{layer}/{product}": [
                value,
                self._error.get((layer, product)),
                self._stuck.get((layer, product), 0),
            ]
            for (layer, product), value in self._log.items()
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        for key, (value, error, stuck) in state.items():
            layer, _, product = key.partition("/")
            loop = (int(layer), product)
            self._log[loop], self._stuck[loop] = value, stuck
            if error is not None:
                self._error[loop] = error

"""What a report needs of one run, and the figures that follow from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from models.roles import ALIASES, ATTENTION, QK, VO, Role
from pretrain.config.recipe import Config, value_at
from pretrain.decay.by_role import rate_factors
from pretrain.decay.sites import coupled_rate
from pretrain.ranks.columns import AnyRow, column_of, numbers_of
from pretrain.ranks.probe import lawful
from pretrain.ranks.schema import OF_THE_LAW
from pretrain.report.sums import mean, total
from pretrain.runs.folder import EVALUATION
from pretrain.runs.loop import NOT_RECORDED

PAIRS = {"qk": QK, "vp": VO}


@dataclass(frozen=True)
class RunData:
    """The contents of one run folder that a report needs."""

    path: Path
    config: Config
    ranks: Sequence[AnyRow]
    """The rank table, at the steps that a report shows (`pretrain.report.sample`)."""
    metrics: Sequence[AnyRow]
    held_out: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    identity: dict[str, str] | None
    """Hashes of initial weights and data order."""
    source: tuple[str, str] | None
    """Hashes of the data and of its tokenizer."""
    starts: list[dict[str, Any]] = field(default_factory=list)
    """Machine and versions of each start."""
    jumped: tuple[int, ...] = ()
    """Blocks of samples that were left out after a fault."""
    skipped: tuple[int, ...] = ()
    """Updates that were skipped because a value was not finite."""
    constant_decay: bool = True
    """Whether every measurement has the same λ of each attention matrix."""
    measured: int = 0
    """Number of steps that were measured, of which ``ranks`` may have a sample."""
    recorded: frozenset[str] | None = None
    """Keys of the recipe that are known of another loop's run; None: all."""

    trunks: tuple[str, ...] = ()
    """Of a fork, hashes of the initial weights of its trunks, as far as they are known."""
    norms: Sequence[dict[str, float]] = ()
    """Step, and norms by role (`pretrain.runs.norm_lines`)."""

    @property
    def seed(self) -> int:
        """The seed, which distinguishes replicates; 0 if it is not recorded."""
        return self.config.seed if self.records("seed") else 0

    def records(self, *keys: str) -> bool:
        """Whether the values of these keys are known; of a loop's run, a default is not a fact."""
        return self.recorded is None or self.recorded.issuperset(keys)

    def value_at(self, key: str) -> Any:
        """The value at a dotted key of the recipe, or `NOT_RECORDED`."""
        return value_at(self.config, key) if self.records(key) else NOT_RECORDED

    @property
    def tokens(self) -> int | None:
        """Tokens that the whole run trains on; None if this is not recorded."""
        if not self.records("train.steps", "train.global_batch", "model.context"):
            return None
        return self.config.train.steps * self.config.train.global_batch * self.config.model.context

    @property
    def environment(self) -> dict[str, Any]:
        """Machine and versions of the last start."""
        return self.starts[-1] if self.starts else {}

    @property
    def precision(self) -> str:
        """The precision of training: ``bf16``, or ``fp32 then bf16``; empty if it is not known."""
        precisions = dict.fromkeys(
            start["precision"] for start in self.starts if "precision" in start
        )
        return " then ".join(precisions)

    @property
    def last_step(self) -> int:
        """The last step that was logged; a skipped update has an event instead."""
        updates = column_of(self.metrics, "step")
        held_out = (int(row["step"]) for row in self.held_out)
        return max([0, int(max(updates, default=0)), *held_out, *self.skipped])

    @property
    def why_unfinished(self) -> str:
        """Why the run is not finished; empty if it is."""
        steps = self.config.train.steps
        if not self.records("train.steps"):
            return f"not finished (step {self.last_step} of a number that is {NOT_RECORDED} yet)"
        if self.last_step < steps:
            return f"not finished ({self.last_step} of {steps} steps)"
        if self.evaluation is None and self.config.evaluation.at_end != "none":
            return (
                f"trained to its last step, {steps}, but not evaluated (no {EVALUATION}); rerun "
                "the same command"
            )
        return ""

    @property
    def is_finished(self) -> bool:
        """Whether it was trained to its last step, and evaluated if the recipe asks for it."""
        return not self.why_unfinished

    @cached_property
    def heads(self) -> list[AnyRow]:
        """Rows of single heads."""
        return [row for row in self.ranks if row["level"] == "head"]

    @cached_property
    def final(self) -> list[AnyRow]:
        """Rows of the last measurement, only heads."""
        return self._heads_at(max(column_of(self.ranks, "step")))

    def _heads_at(self, step: int) -> list[AnyRow]:
        return [row for row in self.heads if row["step"] == step]

    @cached_property
    def decay(self) -> float:
        """Applied λ of the attention matrices: the constant, or Σ rate·λ / Σ rate of the updates.

        It is the mean over the matrices.
        """
        constant = mean(self.of_factors(self.final, "decay"))
        if self._is_constant:
            return _rounded(constant)
        first, last = (choose(row["step"] for row in self.heads) for choose in (min, max))
        if first == last:  # a fork that was measured once: with its trunk's updates
            first, taken = 0, self.exposure
        else:
            taken = self.exposure - mean(self.of_factors(self._heads_at(first), "exposure"))
        rates = total(self._rate(step) for step in self._taken(first, last))
        return _rounded(taken / rates if rates and not math.isnan(rates) else constant)

    def of_factors(self, rows: Iterable[AnyRow], column: str) -> list[float]:
        """The values of a column that exists for both factors, of the matrices that are trained.

        One that is frozen in every measurement is left out: no decay of the run reaches it.
        """
        return [
            row[f"{column}_{side}"]
            for row in rows
            for side in "ab"
            if not self._frozen or (row["layer"], row["product"], side) not in self._frozen
        ]

    @cached_property
    def _frozen(self) -> frozenset[tuple[int, str, str]]:
        """Layer, product and side of the matrices that were never trained."""
        frozen: set[tuple[int, str, str]] = set()
        trained: set[tuple[int, str, str]] = set()
        for row in self.heads:
            for side in "ab" if "frozen_a" in row else "":
                matrix = (row["layer"], row["product"], side)
                (frozen if row[f"frozen_{side}"] else trained).add(matrix)
        return frozenset(frozen - trained)

    @property
    def forked_at(self) -> int:
        """The step of the trunk's checkpoint from which the run was forked; 0 if it was not."""
        origins = [start["forked"]["step"] for start in self.starts if start.get("forked")]
        return int(origins[-1]) if origins else 0

    @property
    def ancestors(self) -> set[str]:
        """Hashes of all weights from which the run descends, its own initial ones included."""
        return {*self.trunks, *((self.identity["initial_weights"],) if self.identity else ())}

    def is_fork_of(self, trunk: RunData) -> bool:
        """Whether the run was forked from a checkpoint of another one."""
        origins = [start["forked"]["run"] for start in self.starts if start.get("forked")]
        if not origins or not trunk.identity or Path(origins[-1]).name != trunk.path.name:
            return False
        return self.trunks[-1:] == (trunk.identity["initial_weights"],)

    @property
    def own_exposure(self) -> float:
        """Σ rate·λ over the updates of this run, without its trunk's."""
        last = max(row["step"] for row in self.heads)
        rates = total(self._rate(step) for step in self._taken(self.forked_at, last))
        return _rounded(self.decay * rates) if self.forked_at else self.exposure

    def _taken(self, first: int, last: int) -> list[int]:
        """Updates (counted from 0) that were made: a skipped one changes nothing."""
        skipped = set(self.skipped)
        return [step for step in range(first, last) if step + 1 not in skipped]

    @property
    def _is_constant(self) -> bool:
        """Whether λ of attention was constant during the run."""
        for policy in self.config.optimizer.weight_decay.policies:
            if any(role in ATTENTION for word in policy.roles for role in ALIASES.get(word, ())):
                return False
        return self.constant_decay

    def _rate(self, step: int) -> float:
        """The rate that multiplied λ in an update (counted from 0), mean over the matrices."""
        return total(self._coupled(role, step) for role in ATTENTION) / 4

    def _coupled(self, role: Role, step: int) -> float:
        """The rate that multiplied λ of a role in an update (counted from 0)."""
        rate, peak = self._learning_rate(step), self.config.optimizer.learning_rate
        factor = self._factors[role]
        return coupled_rate(self._couplings[role], factor * rate, factor * peak)

    def _learning_rate(self, step: int) -> float:
        """Of an update (counted from 0): the schedule's, or that of a loop as it was logged."""
        if self.recorded is None:
            return self.config.learning_rate(step)
        steps, rates = self._logged_rates
        return float(np.interp(step + 1, steps, rates)) if len(steps) else math.nan

    @cached_property
    def _logged_rates(self) -> tuple[list[float], list[float]]:
        steps = column_of(self.metrics, "step")
        rates = column_of(self.metrics, "learning_rate")
        pairs = [(step, rate) for step, rate in zip(steps, rates, strict=True) if _known(rate)]
        return [step for step, _ in pairs], [rate for _, rate in pairs]

    @cached_property
    def _couplings(self) -> dict[Role, str]:
        return {role: _coupling(self.config, role) for role in Role}

    @cached_property
    def _factors(self) -> dict[Role, float]:
        return rate_factors(self.config.optimizer.learning_rate_by)

    @cached_property
    def exposure(self) -> float:
        """Σ rate·λ over the run, mean over the attention matrices."""
        return mean(self.of_factors(self.final, "exposure"))

    @cached_property
    def mlp_decay(self) -> float:
        """Applied λ of the MLP: Σ rate·λ / Σ rate of the updates, mean over the logged entries.

        Between two logged updates λ is interpolated linearly (`logging.every`).
        """
        logged = numbers_of(self.metrics, "weight_decay")
        names = sorted(name for name in logged if name.startswith("mlp_"))
        decays = [self._logged_decay(name, logged[name]) for name in names]
        return _rounded(total(decays) / len(decays)) if decays else 0.0

    def _logged_decay(self, name: str, column: Sequence[float]) -> float:
        steps = column_of(self.metrics, "step")
        logged = [step for step, value in zip(steps, column, strict=True) if not math.isnan(value)]
        values = [value for value in column if not math.isnan(value)]
        if not values:
            return math.nan
        if len(set(values)) == 1:
            return float(values[0])
        role = max(
            (role for role in Role if name.startswith(role.value)), key=lambda r: len(r.value)
        )
        steps = [step + 1 for step in self._taken(0, logged[-1])]
        rates = [self._coupled(role, step - 1) for step in steps]
        decays = np.interp(steps, logged, values)
        whole = total(rates)
        known = whole and not math.isnan(whole)
        return total(rates * decays) / whole if known else float(values[-1])

    def mean(self, product: str, column: str) -> float:
        """Mean over the heads of all layers at the last measurement.

        Balance and discrepancy are means over groups if heads share keys (`lawful`). NaN if the
        table has no such column.
        """
        rows = self.final
        if column in OF_THE_LAW:
            step = self.final[0]["step"] if self.final else 0
            rows = lawful([row for row in self.ranks if row["step"] == step])
        # A table of an older version may lack a newer column.
        values: list[float] = [
            row.get(column, math.nan) for row in rows if row["product"] == product
        ]
        return sum(values) / max(1, len(values))

    @property
    def nonfinite(self) -> list[str]:
        """Heads whose weights are not finite at the last measurement."""
        return [
            f"layer {row['layer']} {row['product']} head {row['head']}"
            for row in self.final
            if row.get("nonfinite")
        ]

    def score(self, key: str, subset: str | None = None) -> float | None:
        """``perplexity``, ``bits_per_byte`` or ``loss`` on the held-out split.

        Returns:
            None if there is none, NaN if it was not finite.
        """
        if self.evaluation is None:
            return None
        part = self.evaluation["overall"]
        if subset is not None:
            part = self.evaluation["subsets"].get(subset, {})
        if key not in part:
            return None
        value = part[key]  # JSON has null for a value that is not finite
        return math.nan if value is None else float(value)


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _rounded(value: float) -> float:
    return float(f"{value:.12g}")


def _coupling(config: Config, role: Role) -> str:
    """The recipe's coupling of a role, from the most specific key that covers it."""
    setting = config.optimizer.weight_decay.coupling
    if isinstance(setting, str):
        return setting
    words = [word for word in setting if role in ALIASES.get(word, ())]
    narrowest = min(words, key=lambda word: len(ALIASES[word]), default="default")
    return setting.get(narrowest, "lr")

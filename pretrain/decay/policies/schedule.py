"""λ times a multiplier that is a function of the step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from pretrain.config.schedule import decay_multiplier, in_steps
from pretrain.decay.policy import Policy, PolicySection
from pretrain.decay.registry import POLICIES
from pretrain.decay.sites import Site
from pretrain.errors import UsageError


class ScheduleDecay(PolicySection):
    """λ times a multiplier that is a function of the step (`decay_multiplier` in
    `pretrain.config.schedule`).

    ``{shape: window, roles: [attention], stop: 0.2}``: decay of attention in the first fifth only.
    """

    shape: Literal["linear", "cosine", "step", "warmup", "window"] = Field(
        "linear",
        description="of the multiplier from start to stop; step: jumps at start; warmup: "
        "rises from 0; window: first inside, last outside",
    )
    start: int | float = Field(0.0, ge=0, description="< 1: share of the steps; else steps")
    stop: int | float | None = Field(None, ge=0, description="as start; empty: the end of the run")
    first: float = Field(1.0, ge=0, description="multiplier before (window: inside)")
    last: float = Field(0.0, ge=0, description="multiplier after (window: outside)")

    def lengths(self) -> dict[str, float]:
        lengths: dict[str, float] = {"start": self.start}
        return lengths if self.stop is None else {**lengths, "stop": self.stop}

    def check_lengths(self, key: str, steps: int) -> None:
        if self.stop is None or self.shape == "step":
            return
        comparable = (self.start < 1) == (self.stop < 1)
        if (comparable and self.start >= self.stop) or self._span(steps) < 0:
            raise UsageError(
                f"{key}.stop: {self.stop:g} is not after start {self.start:g} in a run of {steps} "
                "steps; exchange them"
            )

    def length_remarks(self, key: str, steps: int) -> Iterator[str]:
        begin, span = in_steps(self.start, steps), self._span(steps)
        if self.shape == "step" and self.stop is not None:
            yield f"{key}.stop: has no effect on the shape step, which jumps at start"
        if self.shape == "warmup" and self.last:
            yield f"{key}.last: has no effect on the shape warmup, which ends at first"
        multipliers = self._multipliers(steps)
        if len(multipliers) == 1 and self.first != self.last:
            only = multipliers.pop()
            yield f"{key}: λ is multiplied by {only:g} in every update of a run of {steps:,}"
        elif self.shape != "step":
            if begin + span > steps:
                yield f"{key}.stop: step {begin + span:,} is after the last of a run of {steps:,}"
            if span < 2 and self.shape != "window":
                yield (
                    f"{key}: {self.shape} has {'one step' if span else 'no step'} from start to "
                    f"stop in a run of {steps:,}"
                )

    def multiplier(self, step: int, steps: int) -> float:
        """The multiplier of λ in update number ``step`` of a run of ``steps``."""
        return decay_multiplier(
            step, steps, self.shape, self.start, self.stop, self.first, self.last
        )

    def _span(self, steps: int) -> int:
        """Steps from start to stop."""
        stop = steps if self.stop is None else in_steps(self.stop, steps)
        return stop - in_steps(self.start, steps)

    def _multipliers(self, steps: int) -> set[float]:
        """The multipliers of λ in the updates where they could change."""
        begin = in_steps(self.start, steps)
        end = begin + self._span(steps)
        places = {0, begin - 1, begin, begin + 1, end - 1, end, steps - 1}
        return {self.multiplier(step, steps) for step in places if 0 <= step < steps}


@POLICIES.built_in("schedule")
class Schedule(Policy):
    """A multiplier that is a function of the step."""

    Config = ScheduleDecay
    per_layer = False
    config: ScheduleDecay

    def move(self, site: Site, decay: float, step: int) -> float:
        return decay * self.config.multiplier(step, self.setting.steps)

"""The state of a running training, which the loop and the work between updates share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.checkpoint.saver import Saver
from pretrain.cli.console import warn
from pretrain.config.recipe import Config
from pretrain.distributed.grid import Grid
from pretrain.distributed.watchdog import Watchdog
from pretrain.engine.engine import Engine
from pretrain.ranks.later import LateRanks
from pretrain.ranks.writer import RankWriter
from pretrain.runs.metrics import Tracker
from pretrain.tasks.task import Samples
from pretrain.training.faults import FaultDetector
from pretrain.training.setup import Setup

GENERATION = "generation"
"""Key of a checkpoint's state: the special tokens of an imported model."""


@dataclass(frozen=True)
class SampleSets:
    """The samples on which a run is trained and scored."""

    training: Samples
    """Training samples of a run without jumps."""
    held_out: Any
    """Held-out samples for evaluation during training."""
    order: str
    """Hash of the training samples' order (`pretrain.runs.identity`)."""


@dataclass
class Moving:
    """The part of the state that changes during training, apart from engine, log and
    checkpoints."""

    jumped: list[int]
    """Blocks of samples that are left out (`pretrain.training.faults.block_of`)."""
    owes_evaluation: bool = False
    """Whether a signal cut the evaluation after the last update short, so the next start makes
    it."""
    went_back: int = 0
    """How often the run went back since the last new checkpoint."""
    held_out_loss: tuple[int, float] = (-1, 0.0)
    """(step, loss) of the last evaluation."""
    saved_at: float = field(default_factory=time.monotonic)
    """When the last checkpoint of this start began, or the start itself."""
    drifts: bool = False
    """Whether copies of tensor-parallel processes differed, which is said once."""
    ranks: dict[str, Any] = field(default_factory=dict)
    """Mean figures of the last measurement (`pretrain.ranks.probe.summary`), on the main
    process."""
    measured_for: float = 0.0
    """Seconds that training has waited for a measurement that is not finished."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A running training on this process: its fixed parts, and its changing state."""

    engine: Engine
    setup: Setup
    run: Path
    tracker: Tracker
    table: RankWriter
    late: LateRanks
    saver: Saver
    watchdog: Watchdog
    faults: FaultDetector
    samples: SampleSets
    until: int | None
    initial_weights: str
    generation: dict[str, Any] | None
    """Special tokens of the imported model with which the run began (`models.generation`)."""
    moving: Moving

    @property
    def last(self) -> int:
        """The last step of this start."""
        return self.until or self.config.train.steps

    @property
    def config(self) -> Config:
        """The recipe."""
        return self.setup.config

    @property
    def grid(self) -> Grid:
        """The processes."""
        return self.engine.grid

    def is_due(self, section: str, step: int) -> bool:
        """Whether a section's interval, or the run, ends at a step."""
        return step % self.config.interval(section) == 0 or step == self.last

    def has_not_saved_for_long(self) -> bool:
        """Whether ``checkpoint.minutes`` have passed on this process since the last checkpoint."""
        minutes = self.config.checkpoint.minutes
        return bool(minutes) and time.monotonic() - self.moving.saved_at >= 60 * minutes

    def say(self, step: int, message: str, warning: bool = True) -> None:
        """Report an event in the metrics and on standard error."""
        self.tracker.log("event", step, {"message": message})
        if warning and self.grid.is_main:
            warn(f"step {step}: {message}")

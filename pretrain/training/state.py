"""A run under way: what the loop and all that happens between its updates hand around."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.checkpoint.saver import Saver
from pretrain.config.recipe import Config
from pretrain.console import warn
from pretrain.distributed.grid import Grid
from pretrain.distributed.watchdog import Watchdog
from pretrain.engine.engine import Engine
from pretrain.ranks.probe import Row
from pretrain.runs.metrics import Tracker
from pretrain.tasks.task import Samples
from pretrain.training.faults import FaultDetector
from pretrain.training.setup import Setup

GENERATION = "generation"
"""Key of a checkpoint's state: what an imported model says of its special tokens."""


@dataclass(frozen=True)
class SampleSets:
    """What a run trains on and is scored on."""

    training: Samples
    """Of a run without jumps."""
    held_out: Any
    """For evaluation during training."""
    order: str
    """Hash of the training samples' order (`pretrain.runs.identity`)."""


@dataclass
class Moving:
    """What changes while a run trains, beside the engine, the log and the checkpoints."""

    jumped: list[int]
    """Blocks of samples that are left out (`pretrain.training.faults.block_of`)."""
    owes_evaluation: bool = False
    """Whether a signal cut the evaluation after the last update short: the next start makes it."""
    went_back: int = 0
    """Times since the last checkpoint that was reached."""
    held_out_loss: tuple[int, float] = (-1, 0.0)
    """(step, loss) of the last evaluation."""
    unwritten: dict[int, list[Row]] = field(default_factory=dict)
    """Measurements that the disk did not take, by step."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A run under way, on this rank: its parts, and what moves."""

    engine: Engine
    setup: Setup
    run: Path
    tracker: Tracker
    saver: Saver
    watchdog: Watchdog
    faults: FaultDetector
    samples: SampleSets
    until: int | None
    initial_weights: str
    generation: dict[str, Any] | None
    """Of the imported model that the run began with (`models.generation`)."""
    moving: Moving

    @property
    def last(self) -> int:
        """The step that training ends with, this time."""
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
        """Whether a section's interval ends at a step, or the run does."""
        return step % self.config.interval(section) == 0 or step == self.last

    def say(self, step: int, message: str, warning: bool = True) -> None:
        """An event: in the metrics, and on standard error."""
        self.tracker.log("event", step, {"message": message})
        if warning and self.grid.is_main:
            warn(f"step {step}: {message}")

"""The interface of a task: data, and figures of a model on held-out data.

The loop, the engine and the run folder use a task only through this interface.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from torch import nn

from models.config import GPTConfig
from pretrain.config.recipe import Config
from pretrain.distributed.grid import Grid

Report = Callable[[int, int], None]
"""A function that is called with (done, total)."""
Uses = dict[str, dict[str, float]]
"""By subset: ``corpus``, its training tokens (or images); ``seen``, those that the run uses,
repetitions counted; ``epochs``, how often each is seen."""


class Samples(Protocol):
    """Training samples by number; they depend only on the seed."""

    shares: dict[str, float]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]: ...


class Task(Protocol):
    """The interface of a task."""

    source: str
    """Where the samples come from, for messages."""
    identity: str
    """Hash of everything that determines the samples."""
    tokenizer: str
    """Hash of the tokenizer, or empty."""
    eod: int | None
    """The token that begins and ends documents, if there are documents."""

    def uses(self, config: Config) -> Uses:
        """What a run of this recipe uses of every subset; empty if samples are generated."""

    def complete(self, model: GPTConfig) -> GPTConfig:
        """The model with the number of tokens or classes filled in."""

    def training(self, config: Config) -> Samples:
        """Samples for the whole run."""

    def held_out(self, config: Config, everything: bool = False) -> Any:
        """The data to score: the recipe's fixed sample of its split, or the whole test split."""

    def split(self, config: Config, everything: bool = False) -> str:
        """Name of the split that `held_out` uses."""

    def figures(
        self, module: nn.Module, grid: Grid, config: Config, chosen: Any, report: Report | None
    ) -> dict[str, Any]:
        """Scores on ``chosen``; a collective call. The log shows ``overall``."""


def digest(value: Any) -> str:
    """Hash of plain data."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def use(corpus: int, seen: int) -> dict[str, float]:
    """An entry of `Uses`."""
    return {"corpus": corpus, "seen": seen, "epochs": float(f"{seen / max(1, corpus):.6g}")}

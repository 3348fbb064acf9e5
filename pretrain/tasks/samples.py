"""The interface of a user's task: samples with answers, as a class in the user's file.

Only the data is the user's; loss and score are those of this program, which work on every grid.
Nothing here depends on the recipe, on processes or on DeepSpeed.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import numpy as np

from models.config import GPTConfig
from pretrain.config.extension import Extension, ExtensionError
from pretrain.config.kinds import Kinds, KindSection


class SamplesSection(KindSection):
    """The section ``task.own``; subclasses add keys of their own."""


class Numbered(Protocol):
    """Samples by number."""

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]: ...


class SampleTask:
    """Sequences of tokens, with labels at some of their positions."""

    Config: ClassVar[type[SamplesSection]] = SamplesSection
    """Its keys in a recipe."""

    def __init__(self, config: Any) -> None:
        """
        Args:
            config: its section of the recipe, an instance of `Config`.
        """
        self.config = config

    def answers(self) -> int:
        """Number of tokens: inputs and labels are below it."""
        raise NotImplementedError

    def training(self, seed: int, count: int, model: GPTConfig) -> Numbered:
        """``count`` samples, which depend only on the seed, the number and the section.

        Returns:
            For each number ``(inputs, labels)``: int64 arrays of ``model.context`` tokens; a label
            below 0 does not count.
        """
        raise NotImplementedError

    def held_out(self, count: int, model: GPTConfig) -> Numbered:
        """``count`` samples that are held out from training, the same for every seed."""
        raise NotImplementedError


def _check(extension: Extension) -> None:
    for name in ("answers", "training", "held_out"):
        if getattr(extension.cls, name) is getattr(SampleTask, name):
            raise ExtensionError(f"{extension.kind} has no method {name}")


SAMPLE_TASKS: Kinds[SamplesSection, SampleTask] = Kinds(
    "task", "rankdecay.tasks", "", SamplesSection, SampleTask, _check
)
"""The classes that ``task.own`` can name."""

"""The task with a user's own samples (`pretrain.tasks.samples`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from models.config import GPTConfig
from pretrain.config.extension import Answer, ask
from pretrain.config.recipe import Config
from pretrain.errors import UsageError
from pretrain.tasks.labelled import Labelled
from pretrain.tasks.samples import SAMPLE_TASKS, Numbered
from pretrain.tasks.task import Samples, digest

_EVERYTHING = 2048
"""Number of held-out samples in the last evaluation."""


class OwnTask(Labelled):
    """Samples of a user's class, trained and scored like every labelled task.

    Raises:
        UsageError: one line with the place in the user's file.
    """

    def __init__(self, config: Config) -> None:
        section = config.task.own
        if section is None:
            raise UsageError("task.own: not set; name a class of samples (see docs/extending.md)")
        if missing := SAMPLE_TASKS.absent(section):
            raise UsageError(f"task.own: {missing}")
        if config.task.workers:
            raise UsageError(
                f"task.workers={config.task.workers}: samples of your own are read in the training "
                "process, because others do not run your file; leave task.workers out"
            )
        self._extension, self.source = SAMPLE_TASKS.own_of(section), section.kind
        self._labels = 0
        """Labels of each sample; 0 before the first is read."""
        self._inner = self._ask("__init__", lambda: SAMPLE_TASKS.class_of(section)(section))
        self.answers = self._ask("answers", self._inner.answers)
        if isinstance(self.answers, bool) or not isinstance(self.answers, int) or self.answers < 2:
            raise self._wrong(f"answers returns {self.answers!r}; it must be a number, 2 or more")
        self.identity = digest(["own", json.loads(section.model_dump_json())])

    def training(self, config: Config) -> Samples:
        """The user's samples of the run."""
        count = config.train.steps * config.train.global_batch
        model = self.complete(config.model)
        samples = self._ask("training", lambda: self._inner.training(config.seed, count, model))
        return self._checked(samples, count, model)

    def held_out(self, config: Config, everything: bool = False) -> Samples:
        """The user's held-out samples."""
        count = _EVERYTHING if everything else config.evaluation.documents
        model = self.complete(config.model)
        samples = self._ask("held_out", lambda: self._inner.held_out(count, model))
        return self._checked(samples, count, model)

    def _checked(self, samples: Numbered, count: int, model: GPTConfig) -> Samples:
        checked = _Checked(self, samples, count, model.context)
        checked[0], checked[count - 1]
        return checked

    def sample(self, samples: Numbered, number: int, context: int) -> tuple[np.ndarray, np.ndarray]:
        """One sample, of the right shape and range.

        Raises:
            UsageError: naming the sample.
        """
        pair = self._ask(f"sample {number}", lambda: samples[number])
        try:
            inputs, labels = (np.asarray(part) for part in pair)
        except (TypeError, ValueError):
            raise self._wrong(f"sample {number} is not a pair of inputs and labels") from None
        for name, part, least in (("inputs", inputs, 0), ("labels", labels, None)):
            if part.shape != (context,) or part.dtype.kind not in "iu":
                raise self._wrong(
                    f"sample {number}: {name} are {part.dtype} of shape {part.shape}; they must be "
                    f"integers of shape ({context},), from model.context"
                )
            if part.max() >= self.answers or (least is not None and part.min() < least):
                raise self._wrong(
                    f"sample {number}: {name} range from {part.min()} to {part.max()}, but answers "
                    f"is {self.answers}"
                )
        self._check_labels(number, int((labels >= 0).sum()))
        return inputs.astype(np.int64), labels.astype(np.int64)

    def _check_labels(self, number: int, count: int) -> None:
        """Refuse what would make the mean loss depend on how samples are put together."""
        first, self._labels = self._labels or count, self._labels or count
        if count == 0 or count != first:
            earlier = "" if count == first else f" and an earlier one {first}"
            raise self._wrong(
                f"sample {number} has {count} labels{earlier}; every sample must have the same "
                "number of them, at least 1 (positions without one have label -1)"
            )

    def _ask(self, method: str, call: Callable[[], Answer]) -> Answer:
        code = self._extension.code if self._extension else None
        return ask(code, method, call, self._wrong)

    def _wrong(self, text: str) -> UsageError:
        return UsageError(f"task.own: {self.source}: {text}")


@dataclass
class _Checked:
    """A user's samples; each is checked when it is read."""

    task: OwnTask
    samples: Numbered
    count: int
    context: int
    shares: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.task.sample(self.samples, index, self.context)

"""Associative recall (paper, section 4.2)."""

from __future__ import annotations

from data_pipeline.recall import RecallSamples
from pretrain.config.recipe import Config
from pretrain.tasks.labelled import Labelled
from pretrain.tasks.task import Samples, digest

_HELD_OUT_SEED = 2**40
"""Seed of held-out sequences, larger than any seed that a recipe would have."""


class Recall(Labelled):
    """Associative recall (paper, section 4.2)."""

    source = "associative recall"

    def __init__(self, config: Config) -> None:
        task = config.task
        self.answers = 2 * task.symbols
        self.identity = digest(["recall", task.pairs, task.symbols, task.random_labels])

    def training(self, config: Config) -> Samples:
        """Sequences, some with a random answer."""
        task, count = config.task, config.train.steps * config.train.global_batch
        return RecallSamples(config.seed, count, task.pairs, task.symbols, task.random_labels)

    def held_out(self, config: Config, everything: bool = False) -> Samples:
        """Sequences with true answers, the same for every seed."""
        task = config.task
        count = 2048 if everything else config.evaluation.documents
        return RecallSamples(_HELD_OUT_SEED, count, task.pairs, task.symbols)

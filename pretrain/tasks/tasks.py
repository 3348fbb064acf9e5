"""What a run learns: where samples come from, how many answers there are, how it is scored.

The loop, the engine and the run folder know a task by this interface alone; text, associative
recall and images are trained by the same code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from data_pipeline.dataset import HeldOut, TrainingData, held_out
from data_pipeline.images import ImageSamples, open_images
from data_pipeline.manifest import Manifest, load_manifest
from data_pipeline.recall import RecallSamples
from models.config import GPTConfig
from models.loss import Projection, token_losses
from pretrain.config.recipe import Config
from pretrain.distributed.grid import Grid
from pretrain.errors import UsageError
from pretrain.tasks.score import forward_pass, score, summarize

Report = Callable[[int, int], None]
"""Told (done, total)."""


class Samples(Protocol):
    """Training samples by number, a function of the seed alone."""

    shares: dict[str, float]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]: ...


class Task(Protocol):
    """What the harness asks of a task."""

    source: str
    """Where the samples come from, for messages."""
    identity: str
    """Hash of what decides the samples."""
    tokenizer: str
    """Hash of the tokenizer, or empty."""
    eod: int | None
    """The token that begins and ends documents, if there are documents."""

    def complete(self, model: GPTConfig) -> GPTConfig:
        """The model with the number of tokens or classes filled in."""

    def training(self, config: Config) -> Samples:
        """Samples for the whole run."""

    def held_out(self, config: Config, everything: bool = False) -> Any:
        """What to score: the recipe's fixed sample of its split, or the whole test split."""

    def split(self, config: Config, everything: bool = False) -> str:
        """Name of the split that `held_out` takes from."""

    def figures(
        self, module: nn.Module, grid: Grid, config: Config, chosen: Any, report: Report | None
    ) -> dict[str, Any]:
        """Scores on ``chosen``; a collective call. ``overall`` is what the log shows."""


def open_task(config: Config) -> Task:
    """The task of a recipe, its data opened.

    Raises:
        UsageError, DataError: if the data is missing.
    """
    if config.task.kind == "recall":
        return Recall(config)
    if config.task.kind == "images":
        return ImageClasses(config)
    if not config.data.path:
        raise UsageError("data.path: not set; give the folder that `pretrain data tokenize` wrote")
    return Text(load_manifest(Path(config.data.path)))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


class Text:
    """Next-token prediction on a tokenised corpus."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.source = str(manifest.path)
        self.tokenizer = manifest.tokenizer_sha256
        self.eod: int | None = manifest.eod
        counts = [
            (one.split, one.subset, one.documents, one.tokens, one.bytes)
            for one in manifest.entries
        ]
        self.identity = _digest([counts, manifest.tokenizer_sha256])

    def complete(self, model: GPTConfig) -> GPTConfig:
        """The model with the tokenizer's vocabulary, unless it asks for a larger one."""
        size = model.vocabulary_size or self.manifest.vocabulary_size
        if size < self.manifest.vocabulary_size:
            raise UsageError(
                f"model.vocabulary_size: {size} is less than the {self.manifest.vocabulary_size} "
                f"tokens of {self.manifest.tokenizer}; leave it out to take the data's"
            )
        return model.model_copy(update={"vocabulary_size": size})

    def training(self, config: Config) -> Samples:
        """Megatron's blend of the subsets."""
        samples = config.train.steps * config.train.global_batch
        return TrainingData(
            self.manifest, config.data.weights, config.model.context, config.seed, samples,
            config.model.vocabulary_size,
        )  # fmt: skip

    def held_out(self, config: Config, everything: bool = False) -> list[HeldOut]:
        """Documents."""
        limit = None if everything else config.evaluation.documents
        size = config.model.vocabulary_size
        return held_out(self.manifest, self.split(config, everything), limit, size)

    def split(self, config: Config, everything: bool = False) -> str:
        """``test`` for everything, where the data has one; else the recipe's."""
        splits = {entry.split for entry in self.manifest.entries}
        return "test" if everything and "test" in splits else config.evaluation.split

    def figures(
        self,
        module: nn.Module,
        grid: Grid,
        config: Config,
        chosen: list[HeldOut],
        report: Report | None,
    ) -> dict[str, Any]:
        """Loss, perplexity and bits per byte, overall and per subset."""
        batch, eod = config.evaluation.batch, self.manifest.eod
        nats = score(module, grid, config.model, chosen, eod, batch, progress=report)
        return {"stride": config.model.context, **summarize(chosen, nats)}


class _Labelled:
    """Samples with one answer each: scored by loss and accuracy."""

    answers: int
    """Tokens or classes."""
    tokenizer = ""
    eod: int | None = None

    def complete(self, model: GPTConfig) -> GPTConfig:
        """The model with the number of answers."""
        if model.vocabulary_size not in (0, self.answers):
            raise UsageError(
                f"model.vocabulary_size: {model.vocabulary_size} is not the {self.answers} of the "
                "task; leave it out"
            )
        return model.model_copy(update={"vocabulary_size": self.answers})

    def split(self, config: Config, everything: bool = False) -> str:
        """There is one held-out set; all of it counts as the test."""
        return "test" if everything else config.evaluation.split

    def figures(
        self,
        module: nn.Module,
        grid: Grid,
        config: Config,
        chosen: Samples,
        report: Report | None,
    ) -> dict[str, Any]:
        """Mean loss and share of right answers."""
        batch = config.evaluation.batch
        count = len(chosen)
        rounds = -(-count // (batch * grid.data))
        totals = torch.zeros(2, dtype=torch.float64)
        was_training = module.training
        module.eval()
        with torch.no_grad():
            for turn in range(rounds):
                first = (turn * grid.data + grid.data_rank) * batch
                numbers = range(min(first, count - 1), max(min(first + batch, count), 1))
                pairs = [chosen[number] for number in numbers]
                inputs, labels = (
                    torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True)
                )
                wanted = partial(_scored, labels=labels.to(grid.device), grid=grid)
                sums = forward_pass(module, grid, config.model, inputs, wanted)
                if sums is not None and first < count:
                    totals += sums
                if report:
                    report(turn + 1, rounds)
        module.train(was_training)
        if grid.world_size > 1:
            totals = totals.to(grid.device)
            dist.all_reduce(totals)
        loss, right = (totals / count).tolist()
        return {"overall": {"samples": count, "loss": loss, "accuracy": right}, "subsets": {}}


def _scored(projection: Projection, labels: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Sums of (loss, right answers) over a batch, on one rank of the tensor-parallel group.

    Args:
        labels: ``[batch, sequence]``, below 0 where nothing is asked.
    """
    targets, logits = labels.t(), projection.logits()
    best, answer = logits.float().max(-1)
    answer = answer + grid.tensor_rank * logits.shape[-1]
    if grid.tensor > 1:
        group = grid.tensor_parallel.group
        parts = [torch.empty_like(torch.stack([best, best])) for _ in range(grid.tensor)]
        dist.all_gather(parts, torch.stack([best, answer.to(best.dtype)]), group=group)
        every = torch.stack(parts)  # [ranks, 2, sequence, batch]
        winner = every[:, 0].argmax(0, keepdim=True)
        answer = every[:, 1].gather(0, winner)[0].long()
    losses = token_losses(projection, targets.clamp_min(0))
    asked = targets >= 0
    sums = torch.stack([losses[asked].double().sum(), (answer == targets)[asked].double().sum()])
    return sums.cpu() if grid.tensor_rank == 0 else torch.zeros(2, dtype=torch.float64)


class Recall(_Labelled):
    """Associative recall (paper, section 4.2)."""

    source = "associative recall"

    def __init__(self, config: Config) -> None:
        task = config.task
        self.answers = 2 * task.symbols
        self.identity = _digest(["recall", task.pairs, task.symbols, task.random_labels])

    def training(self, config: Config) -> Samples:
        """Sequences, some with a random answer."""
        task, count = config.task, config.train.steps * config.train.global_batch
        return RecallSamples(config.seed, count, task.pairs, task.symbols, task.random_labels)

    def held_out(self, config: Config, everything: bool = False) -> Samples:
        """Sequences with true answers, the same for every seed."""
        task = config.task
        count = 2048 if everything else config.evaluation.documents
        return RecallSamples(_HELD_OUT_SEED, count, task.pairs, task.symbols)


_HELD_OUT_SEED = 2**40
"""Of held-out sequences: beyond any seed of a recipe that people write."""


class ImageClasses(_Labelled):
    """Image classification."""

    def __init__(self, config: Config) -> None:
        task = config.task
        self._train = open_images(task.source, task.path, "train")
        self._held = open_images(task.source, task.path, "test")
        self.source = task.path or task.source
        self.answers = self._train.classes
        self.images = len(self._train.labels)
        self.identity = _digest(["images", self._train.identity, task.augment])

    def training(self, config: Config) -> Samples:
        """Every image once an epoch, in a new order."""
        model, count = config.model, config.train.steps * config.train.global_batch
        shape = (model.image_size, model.patch_size, model.image_channels)
        return ImageSamples(self._train, *shape, config.task.augment, config.seed, count)

    def held_out(self, config: Config, everything: bool = False) -> Samples:
        """Images that no training sees."""
        model = config.model
        found = ImageSamples(self._held, model.image_size, model.patch_size, model.image_channels)
        if not everything:
            found.count = min(len(found), config.evaluation.documents)
        return found

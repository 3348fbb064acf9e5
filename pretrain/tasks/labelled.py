"""Tasks whose samples have one answer each, or a label at some positions: their score."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from models.config import GPTConfig
from models.loss import Projection, token_losses
from pretrain.config.recipe import Config
from pretrain.distributed.grid import Grid
from pretrain.errors import UsageError
from pretrain.tasks.score import forward_pass
from pretrain.tasks.task import Report, Samples, Uses


class Labelled:
    """Samples with one answer each: scored by loss and accuracy."""

    answers: int
    """Number of tokens or classes."""
    tokenizer = ""
    eod: int | None = None

    def uses(self, config: Config) -> Uses:
        """Empty: samples are generated."""
        return {}

    def complete(self, model: GPTConfig) -> GPTConfig:
        """The model with the number of answers."""
        if model.vocabulary_size not in (0, self.answers):
            raise UsageError(
                f"model.vocabulary_size: {model.vocabulary_size} is not the task's number of "
                f"answers, {self.answers}; remove the key"
            )
        return model.model_copy(update={"vocabulary_size": self.answers})

    def split(self, config: Config, everything: bool = False) -> str:
        """Always ``test``: there is one held-out set, and all of it is the test split."""
        return "test" if everything else config.evaluation.split

    def figures(
        self,
        module: nn.Module,
        grid: Grid,
        config: Config,
        chosen: Samples,
        report: Report | None,
    ) -> dict[str, Any]:
        """Mean loss and share of correct answers."""
        batch = config.evaluation.batch
        count = len(chosen)
        rounds = -(-count // (batch * grid.data))
        totals = torch.zeros(3, dtype=torch.float64)
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
        loss, right = (totals[:2] / totals[2]).tolist()
        return {"overall": {"samples": count, "loss": loss, "accuracy": right}, "subsets": {}}


def _scored(projection: Projection, labels: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Sums over a batch of (loss, correct answers, answers), on one tensor-parallel process.

    Args:
        labels: ``[batch, sequence]``, below 0 at positions that do not count.
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
    has_label = targets >= 0
    counted = (losses[has_label], (answer == targets)[has_label], has_label)
    sums = torch.stack([column.double().sum() for column in counted])
    return sums.cpu() if grid.tensor_rank == 0 else torch.zeros(3, dtype=torch.float64)

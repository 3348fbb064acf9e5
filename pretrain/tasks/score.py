"""Held-out loss, perplexity and bits per byte, per subset of the Pile, on any grid.

Every byte of every document counts once. A document longer than the context is scored in
windows as in lm-eval's rolling log-likelihood: the first token is predicted from the
end-of-document token, each later window sees at least one token of context.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from data_pipeline.dataset import HeldOut
from data_pipeline.pile import PILE_WEIGHTS
from models.loss import Projection, token_losses
from pretrain.distributed.grid import Grid

_PAD_MULTIPLE = 64


class Shape(Protocol):
    """What is needed to know of a model."""

    @property
    def context(self) -> int:
        """Largest number of tokens that it sees."""

    @property
    def hidden_size(self) -> int:
        """Its width."""


@dataclass(frozen=True)
class Window:
    """The part of a document that is scored in one forward pass."""

    document: int
    inputs: np.ndarray
    """Tokens that the model sees."""
    targets: np.ndarray
    """The last ``len(targets)`` positions predict these."""


def windows(
    tokens: np.ndarray, prefix: int, context: int, stride: int, document: int = 0
) -> Iterator[Window]:
    """Cut a document into windows so that every token is predicted exactly once.

    Args:
        prefix: the token before the first one (end of document).
        context: largest number of tokens that the model sees.
        stride: tokens predicted by each window after the first; ``context`` means disjoint
            windows as in lm-eval, a smaller stride gives every token more context.
    """
    first = min(context, len(tokens))
    if first:
        inputs = np.concatenate(([prefix], tokens[: first - 1]))
        yield Window(document, inputs, tokens[:first])
    done = first
    while done < len(tokens):
        count = min(len(tokens) - done, stride)
        end = done + count
        # As in lm-eval, the window is full, so that the last, shorter part sees more context.
        start = end - 1 - context
        yield Window(document, tokens[start : end - 1], tokens[done:end])
        done = end


def score(
    module: nn.Module,
    grid: Grid,
    model: Shape,
    documents: list[HeldOut],
    eod: int,
    batch: int = 8,
    stride: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Negative log-likelihood of each document, in nats; a collective call.

    Args:
        module: this process's part of the model (whole, or a pipeline stage).
        batch: windows per forward pass; changes only the speed.
        stride: see `windows`; 0: the context.
        progress: called with (batches done, batches in total).

    Returns:
        ``[documents]`` float64, equal on every process.
    """
    cut = [
        window
        for number, document in enumerate(documents)
        for window in windows(document.tokens, eod, model.context, stride or model.context, number)
    ]
    cut.sort(key=lambda window: (-len(window.inputs), window.document))
    batches = [cut[start : start + batch] for start in range(0, len(cut), batch)]
    # Every process makes the same number of passes, because ZeRO-3 gathers in each of them.
    rounds = -(-len(batches) // grid.data)
    totals = torch.zeros(len(documents), dtype=torch.float64)
    was_training = module.training
    module.eval()
    with torch.no_grad():
        for turn in range(rounds):
            number = turn * grid.data + grid.data_rank
            part = batches[number] if number < len(batches) else batches[-1]
            losses = _forward(module, grid, model, part)
            if losses is not None and number < len(batches):
                for window, row in zip(part, losses, strict=True):
                    stop = len(window.inputs)
                    scored = row[stop - len(window.targets) : stop]
                    totals[window.document] += scored.double().sum()
            if progress:
                progress(turn + 1, rounds)
    module.train(was_training)
    if grid.world_size > 1:
        totals = totals.to(grid.device)
        dist.all_reduce(totals)
    return totals.cpu().numpy()


def _forward(
    module: nn.Module, grid: Grid, model: Shape, part: list[Window]
) -> torch.Tensor | None:
    """Token losses ``[batch, length]`` on the process that reports them, else None."""
    longest = max(len(window.inputs) for window in part)
    length = min(-(-longest // _PAD_MULTIPLE) * _PAD_MULTIPLE, model.context)
    inputs = torch.zeros(len(part), length, dtype=torch.int64)
    targets = torch.zeros(len(part), length, dtype=torch.int64)
    for row, window in enumerate(part):
        stop = len(window.inputs)
        inputs[row, :stop] = torch.from_numpy(window.inputs.astype(np.int64))
        targets[row, stop - len(window.targets) : stop] = torch.from_numpy(
            window.targets.astype(np.int64)
        )
    wanted = partial(_losses, targets=targets.to(grid.device).t())
    losses = forward_pass(module, grid, model, inputs, wanted)
    return None if losses is None or grid.tensor_rank else losses.t().cpu()


def _losses(output: Projection | torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every token ``[sequence, batch]``, of our models or from logits."""
    if isinstance(output, Projection):
        return token_losses(output, targets)
    rows = zip(output, targets, strict=True)  # one position at a time: the softmax is in float32
    return torch.stack([
        torch.nn.functional.cross_entropy(logits.float(), row, reduction="none")
        for logits, row in rows
    ])  # fmt: skip


def forward_pass(
    module: nn.Module,
    grid: Grid,
    model: Shape,
    inputs: torch.Tensor,
    finish: Callable[[Any], torch.Tensor],
) -> torch.Tensor | None:
    """Pass a batch through all pipeline stages; a collective call.

    Args:
        inputs: tokens ``[batch, length]``, or patches ``[batch, patches, values]``.

    Returns:
        The result of ``finish`` on the last stage, else None.
    """
    x = inputs.to(grid.device)
    coordinates = {"data": grid.data_rank, "tensor": grid.tensor_rank}
    if grid.pipeline_rank > 0:
        batch, length = inputs.shape[:2]
        rows = length // grid.tensor if grid.sequence_parallel else length
        dtype = next(module.parameters()).dtype
        x = torch.empty(rows, batch, model.hidden_size, dtype=dtype, device=grid.device)
        dist.recv(x, grid.global_rank(pipeline=grid.pipeline_rank - 1, **coordinates))
    if grid.pipeline == 1:
        output: torch.Tensor = module(x, finish)
        return output
    y = module(x)
    if not grid.is_last_stage:
        dist.send(y.contiguous(), grid.global_rank(pipeline=grid.pipeline_rank + 1, **coordinates))
        return None
    return finish(y)


def summarize(documents: list[HeldOut], nats: np.ndarray) -> dict[str, Any]:
    """Loss, perplexity and bits per byte: overall, per subset, and weighted like the Pile.

    Returns:
        The contents of ``evaluation.json``.
    """
    subsets: dict[str, list[int]] = {}
    for number, document in enumerate(documents):
        subsets.setdefault(document.subset, []).append(number)
    per_subset = {
        name: _figures([documents[i] for i in numbers], nats[numbers])
        for name, numbers in sorted(subsets.items())
    }
    present = [name for name in PILE_WEIGHTS if name in per_subset]
    return {
        "overall": _figures(documents, nats),
        "subsets": per_subset,
        "pile_weighted": _weighted(per_subset, present),
        "pile_subsets_present": present,
        "pile_subsets_absent": [name for name in PILE_WEIGHTS if name not in per_subset],
        "documents_sha256": documents_hash(documents),
    }


def _figures(documents: list[HeldOut], nats: np.ndarray) -> dict[str, float]:
    tokens = sum(len(document.tokens) for document in documents)
    size = sum(document.bytes for document in documents)
    total = float(nats.sum())
    loss = total / max(1, tokens)
    return {
        "documents": len(documents),
        "tokens": tokens,
        "bytes": size,
        "loss": loss,
        "perplexity": _perplexity(loss),
        "bits_per_byte": total / (max(1, size) * math.log(2)),
    }


def _perplexity(loss: float) -> float:
    """exp(loss); infinity if that is too large for a float, NaN for NaN."""
    return math.exp(loss) if not loss > 709 else math.inf


def _weighted(
    per_subset: dict[str, dict[str, float]], present: list[str]
) -> dict[str, float] | None:
    """Averages with the Pile's published shares, over the subsets that are present."""
    if not present:
        return None
    total = sum(PILE_WEIGHTS[name] for name in present)

    def mean(key: str) -> float:
        return sum(PILE_WEIGHTS[name] * per_subset[name][key] for name in present) / total

    loss = mean("loss")
    return {
        "loss": loss,
        "perplexity": _perplexity(loss),
        "bits_per_byte": mean("bits_per_byte"),
        "share_of_pile": total / sum(PILE_WEIGHTS.values()),
    }


def documents_hash(documents: list[HeldOut]) -> str:
    """Identity of a list of documents, independent of tokenizer and order."""
    lines = sorted(f"{document.subset}\t{document.hash:016x}" for document in documents)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()

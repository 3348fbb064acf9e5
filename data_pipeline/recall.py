"""Associative recall: x₁ y₁ … x_N y_N x, where x is one of the earlier ones; predict its y."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_BLOCK = 256
"""Number of samples that are drawn together; each still depends only on (seed, number)."""
IGNORED = -1
"""Label of the positions that do not count."""


class RecallSamples:
    """Sequences of 2N + 1 tokens, drawn on demand.

    The x of a sequence are distinct symbols 0 … S-1, the y are any of S … 2S-1.
    """

    def __init__(
        self, seed: int, count: int, pairs: int, symbols: int, random_labels: float = 0.0
    ) -> None:
        self.seed, self.count = seed, count
        self.shares = {"recall": 1.0}
        self.pairs, self.symbols, self.random_labels = pairs, symbols, random_labels

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels of a sample, each ``[2N + 1]`` int64; only the last label counts."""
        inputs, labels = _draw(
            self.seed, index // _BLOCK, self.pairs, self.symbols, self.random_labels
        )
        return inputs[index % _BLOCK], labels[index % _BLOCK]


@lru_cache(maxsize=4)
def _draw(
    seed: int, block: int, pairs: int, symbols: int, random_labels: float
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, block])
    order = rng.random((_BLOCK, symbols)).argsort(1)
    keys = order[:, :pairs]
    values = symbols + rng.integers(symbols, size=(_BLOCK, pairs))
    queried = rng.integers(pairs, size=_BLOCK)
    rows = np.arange(_BLOCK)
    inputs = np.empty((_BLOCK, 2 * pairs + 1), np.int64)
    inputs[:, 0:-1:2], inputs[:, 1::2] = keys, values
    inputs[:, -1] = keys[rows, queried]
    answers = values[rows, queried]
    noise = symbols + rng.integers(symbols, size=_BLOCK)
    answers = np.where(rng.random(_BLOCK) < random_labels, noise, answers)
    labels = np.full_like(inputs, IGNORED)
    labels[:, -1] = answers
    return inputs, labels

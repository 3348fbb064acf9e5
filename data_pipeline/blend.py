"""Draws the samples of a blend from its subsets, by Megatron's rule.

Sample i comes from the subset that is furthest behind its share. This depends on the samples before
it alone, so a run begins with the first few million and makes more when it comes to them.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from data_pipeline.indexed import index_classes
from data_pipeline.shared_indices import shared_arrays

FIRST = 1 << 22
"""Samples that are placed at the start, if there are more."""


class Blend:
    """``samples`` samples of some subsets."""

    def __init__(self, subsets: list[Any], shares: list[float], samples: int) -> None:
        """
        Args:
            subsets: sample number -> sample, without end.
            shares: of the subsets.
        """
        self._subsets, self._samples = subsets, samples
        self._shares = index_classes().normalize(shares)
        self._places = self._placed(min(samples, FIRST))

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample.

        Raises:
            IndexError: beyond the last.
        """
        number = int(index)
        if not 0 <= number < self._samples:
            raise IndexError(f"sample {number} of {self._samples}")
        subset, position = self.place(number)
        sample: dict[str, Any] = self._subsets[subset][position]
        return sample

    def place(self, number: int) -> tuple[int, int]:
        """The subset of a sample, and its place there."""
        if number >= len(self._places[0]):
            count = FIRST
            while count <= number:  # the same counts on every process, which share the arrays
                count *= 4
            self._places = self._placed(min(self._samples, count))
        which, where = self._places
        return int(which[number]), int(where[number])

    def _placed(self, count: int) -> tuple[np.ndarray, ...]:
        """Subset and place of the first samples: ``[count]`` int16 and ``[count]`` int64."""

        def build() -> tuple[np.ndarray, ...]:
            which, where = np.zeros(count, np.int16), np.zeros(count, np.int64)
            megatron = index_classes()
            megatron.blending_indices(which, where, self._shares, len(self._subsets), count, False)
            return which, where

        key = f"blend/{count}/" + "/".join(f"{share!r}" for share in self._shares)
        digest = hashlib.sha256(key.encode()).hexdigest()[:32]
        return shared_arrays(digest, 10 * count, build)

"""Rotary positions, and how Llama 3.1 stretches them to longer contexts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RotaryScaling:
    """Slow pairs turn more slowly by a factor, fast ones as before (Grattafiori et al. 2024)."""

    factor: float
    context: int
    """Tokens of the context from which it is stretched."""
    low: float
    """Pairs with fewer turns than this in that context are divided by the factor."""
    high: float
    """Pairs with more turns are not changed; between the two, the frequencies are mixed."""

    def stretched(self, frequencies: torch.Tensor) -> torch.Tensor:
        """The frequencies of a longer context."""
        turns = self.context * frequencies / (2 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return kept * frequencies + (1 - kept) * frequencies / self.factor


class Rotary:
    """Rotary positions (Su et al. 2021), pairs (j, j + rotary_dim/2); no state, no dtype cast.

    Kept outside the modules' buffers so that converting a model to bf16 leaves it in float32.
    """

    def __init__(self, rotary_dim: int, base: float, scaling: RotaryScaling | None = None) -> None:
        self.rotary_dim, self.base, self.scaling = rotary_dim, base, scaling
        self._cache: tuple[int, torch.device, torch.Tensor, torch.Tensor] | None = None

    def frequencies(self) -> torch.Tensor:
        """Radians per position of each pair, ``[rotary_dim / 2]`` float64."""
        steps = torch.arange(0, self.rotary_dim, 2, dtype=torch.float64) / self.rotary_dim
        frequencies = self.base**-steps
        return frequencies if self.scaling is None else self.scaling.stretched(frequencies)

    def tables(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, each ``[length, rotary_dim / 2]`` float32.

        Shorter tables are views of the longest one so far. So that of training stays where it is
        while documents are scored: a CUDA graph of a pass reads it there.
        """
        cache = self._cache
        if cache is None or cache[0] < length or cache[1] != device:
            angles = torch.outer(torch.arange(length, dtype=torch.float64), self.frequencies())
            cos, sin = angles.cos().float().to(device), angles.sin().float().to(device)
            cache = self._cache = (length, device, cos, sin)
        return cache[2][:length], cache[3][:length]

    def __call__(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Rotate ``x`` of shape ``[batch, heads, sequence, head]``.

        Args:
            positions: ``[batch, sequence]``; None: counted from the first.
        """
        cos, sin = self.tables(x.shape[-2], x.device)
        if positions is not None:
            cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
        half = self.rotary_dim // 2
        first, second = x[..., :half].float(), x[..., half : self.rotary_dim].float()
        rotated = (first * cos - second * sin, second * cos + first * sin)
        return torch.cat([*(part.to(x.dtype) for part in rotated), x[..., self.rotary_dim :]], -1)

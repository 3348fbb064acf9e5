"""What contenders train: a GPT-2 with tied head or a Llama, random tokens, AdamW, clipping."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Shape:
    """One size of the benchmark."""

    layers: int
    hidden: int
    heads: int
    context: int
    batch: int
    vocabulary: int = 8192
    rate: float = 3e-4
    decay: float = 0.1
    clipping: float = 1.0
    dialect: str = "gpt2"
    key_value_heads: int = 0
    """0: as many as heads."""
    inner: int = 0
    """Width of the MLP; 0: four times the hidden size."""

    @property
    def is_llama(self) -> bool:
        """Rotary positions, RMSNorm, SwiGLU, no biases, a head of its own."""
        return self.dialect == "llama"

    @property
    def key_width(self) -> int:
        """Of all keys, and of all values."""
        return self.hidden // self.heads * (self.key_value_heads or self.heads)

    @property
    def parameters(self) -> int:
        """Of matrices that multiply: blocks and head."""
        attention = 2 * self.hidden * (self.hidden + self.key_width)
        mlp = (3 if self.is_llama else 2) * self.hidden * (self.inner or 4 * self.hidden)
        return self.layers * (attention + mlp) + self.vocabulary * self.hidden

    @property
    def flops_per_token(self) -> float:
        """6 N for the matrices, and 6 L d s for causal attention (half of its square).

        Forward and backward are three products of 2 flops a parameter (Kaplan et al. 2020).
        """
        return 6.0 * self.parameters + 6.0 * self.layers * self.hidden * self.context

    def plain(self) -> dict[str, float]:
        """As JSON."""
        return asdict(self)


SHAPES = {
    "tiny-llama": Shape(layers=2, hidden=64, heads=4, context=64, batch=4, vocabulary=512,
                        dialect="llama", key_value_heads=2, inner=128),
    "tiny": Shape(layers=6, hidden=256, heads=4, context=256, batch=16),
    "17m": Shape(layers=8, hidden=384, heads=6, context=256, batch=8),
    "125m": Shape(layers=12, hidden=768, heads=12, context=512, batch=2, vocabulary=50_304),
    "gpu-7m": Shape(layers=6, hidden=256, heads=4, context=256, batch=128),
    "gpu-125m": Shape(layers=12, hidden=768, heads=12, context=2048, batch=16, vocabulary=50_304),
    "gpu-350m": Shape(layers=24, hidden=1024, heads=16, context=2048, batch=16, vocabulary=50_304),
    "gpu-llama": Shape(layers=12, hidden=768, heads=12, context=2048, batch=16, vocabulary=50_304,
                       dialect="llama", key_value_heads=4, inner=2048),
    "gpu-1.3b": Shape(layers=24, hidden=2048, heads=16, context=2048, batch=8, vocabulary=50_304),
}  # fmt: skip


def batches(shape: Shape) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Inputs and labels ``[batch, context]`` int64, the same for every contender."""
    rng = np.random.default_rng(0)
    while True:
        tokens = rng.integers(0, shape.vocabulary, (shape.batch, shape.context + 1))
        yield tokens[:, :-1], tokens[:, 1:]

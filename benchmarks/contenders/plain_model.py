"""A GPT-2 and a Llama in plain PyTorch: what a reader would write from the papers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.contenders.shapes import Shape


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d, self.heads = shape.hidden, shape.heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, d = x.shape
        q, k, v = (
            projected.view(batch, length, self.heads, -1).transpose(1, 2)
            for projected in self.qkv(self.norm1(x)).split(d, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, d))
        out: torch.Tensor = x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return out


class PlainGPT(nn.Module):
    """Returns the mean loss."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.positions = nn.Embedding(shape.context, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


class LlamaBlock(nn.Module):
    """Pre-norm grouped-query attention and SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d, self.heads = shape.hidden, shape.heads
        self.widths = [d, shape.key_width, shape.key_width]
        self.norm1, self.norm2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.qkv = nn.Linear(d, sum(self.widths), bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.gate_up = nn.Linear(d, 2 * shape.inner, bias=False)
        self.down = nn.Linear(shape.inner, d, bias=False)

    def forward(self, x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        batch, length, d = x.shape
        q, k, v = (
            part.view(batch, length, -1, d // self.heads).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).split(self.widths, dim=2)
        )
        q, k = rotated(q, turns), rotated(k, turns)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, d))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        out: torch.Tensor = x + self.down(F.silu(gate) * up)
        return out


def rotated(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """``[batch, heads, length, head]`` rotated; ``turns``: cosines and sines of every position."""
    one, other = x.chunk(2, dim=-1)
    cosine, sine = turns.to(x.dtype)
    return torch.cat([one * cosine - other * sine, other * cosine + one * sine], dim=-1)


class PlainLlama(nn.Module):
    """Returns the mean loss."""

    turns: torch.Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.blocks = nn.ModuleList(LlamaBlock(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        size = shape.hidden // shape.heads
        angles = torch.outer(
            torch.arange(shape.context), 10_000.0 ** (-torch.arange(0, size, 2) / size)
        )
        self.register_buffer("turns", torch.stack([angles.cos(), angles.sin()]))
        for parameter in self.parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.tokens(inputs)
        for block in self.blocks:
            x = block(x, self.turns)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

"""The four matrices of an attention layer, by head: what rank statistics are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionShape:
    """Heads and widths of the attention of a model of any origin."""

    num_layers: int
    num_attention_heads: int
    key_value_heads: int
    head_size: int
    hidden_size: int
    rotary_dim: int
    """Leading dimensions of a head that rotate, as pairs (j, j + rotary_dim/2); 0: none."""
    qk_norm: bool
    """Whether queries and keys are normalised: then the factors' sizes have no meaning."""

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.num_attention_heads // self.key_value_heads


@dataclass(frozen=True)
class Factors:
    """The four matrices of some key/value heads, with g query heads each."""

    query: Tensor
    """``[units, g, head, width]``"""
    key: Tensor
    """``[units, head, width]``"""
    value: Tensor
    """``[units, head, width]``"""
    output: Tensor
    """``[units, g, width, head]``"""

    @staticmethod
    def joined(parts: list[Factors]) -> Factors:
        """The units of several layers of one model."""
        if len(parts) == 1:
            return parts[0]
        return Factors(
            *(
                torch.cat([getattr(part, name) for part in parts])
                for name in ("query", "key", "value", "output")
            )
        )

    @staticmethod
    def of_layer(
        shape: AttentionShape, query: Tensor, key: Tensor, value: Tensor, output: Tensor
    ) -> Factors:
        """Cut the matrices of a layer into heads.

        Args:
            query: ``[heads · head, width]``.
            key, value: ``[key/value heads · head, width]``.
            output: ``[width, heads · head]``.
        """
        units, group, head = shape.key_value_heads, shape.group, shape.head_size
        return Factors(
            query=query.reshape(units, group, head, -1),
            key=key.reshape(units, head, -1),
            value=value.reshape(units, head, -1),
            output=output.reshape(-1, units, group, head).permute(1, 2, 0, 3),
        )

    def matrices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The inverse of `of_layer`: query, key, value, output."""
        return (
            self.query.flatten(0, 2),
            self.key.flatten(0, 1),
            self.value.flatten(0, 1),
            self.output.permute(2, 0, 1, 3).flatten(1, 3),
        )

    def units(self, start: int, stop: int) -> Factors:
        """Some of the key/value heads."""
        part = slice(start, stop)
        return Factors(self.query[part], self.key[part], self.value[part], self.output[part])

    def on_host(self) -> Factors:
        """Copies in host memory; from a GPU they are being made when this returns."""
        return Factors(*map(_host_copy, (self.query, self.key, self.value, self.output)))

    def row_norms(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Squared norms per dimension of the first key/value head, by product.

        Returns:
            ``qk``: (of W_K's rows, of W_Q's rows), ``vp``: (of P's columns, of W_V's rows), each
            ``[head]`` float64; query heads that share keys are summed, because the balance law
            applies to the group.
        """
        query, key, value, output = (
            matrices[0].double().square()
            for matrices in (self.query, self.key, self.value, self.output)
        )
        return {
            "qk": (key.sum(1), query.sum((0, 2))),
            "vp": (output.sum((0, 1)), value.sum(1)),
        }


def _host_copy(values: Tensor) -> Tensor:
    pinned = values.device.type != "cpu"  # only then a device copies by itself
    copy = torch.empty_like(values, device="cpu", pin_memory=pinned)
    return copy.copy_(values, non_blocking=True)

"""Cuts attention products to their leading directions, to measure what a lower rank would cost.

W = A·Bᵀ is replaced by its best approximation of rank k (Eckart & Young 1936), as factors of the
same shapes with k columns in use, so that the same code runs the cut model. With ``smaller``, only
the k columns are returned. Biases are treated as one more input, the constant 1 (paper, section 2),
so that only the product's rank changes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.factors import AttentionShape, Factors
from models.roles import ParameterInfo
from pretrain.checkpoint.manifest import MASTER
from pretrain.checkpoint.reader import ATTENTION_PARTS, Checkpoint
from pretrain.errors import UsageError
from pretrain.spectra import product_statistics, pseudo_rank


@dataclass(frozen=True)
class RankChoice:
    """How many singular values each product of each head keeps."""

    share: float | None
    """Share of the head's width; None: the measured pseudo-rank."""
    products: tuple[str, ...] = ("qk", "vp")
    threshold: float | None = None
    """Share of Σσ that the measured rank covers; None: that of the run."""

    def keep(self, sigma: Tensor) -> Tensor:
        """Number of values kept, ``[...]`` int64, of spectra ``[..., n]``, descending."""
        n = sigma.shape[-1]
        if self.share is None:
            assert self.threshold is not None
            return (pseudo_rank(sigma, self.threshold) * n).round().long()
        count = max(1, round(self.share * n))
        return torch.full(sigma.shape[:-1], count, dtype=torch.int64)


_PRODUCTS: dict[str, tuple[str, ...]] = {"both": ("qk", "vp"), "qk": ("qk",), "vp": ("vp",)}


def parse_rank(text: str, products: str = "both") -> RankChoice:
    """A choice from the command line: a share such as ``0.75``, or ``measured``.

    Raises:
        UsageError: naming the option.
    """
    if products not in _PRODUCTS:
        raise UsageError(f"--attention-product: {products} is not one of qk, vp, both")
    if text == "measured":
        return RankChoice(None, _PRODUCTS[products])
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise UsageError(
            f"--attention-rank: {text} is not a share above 0 and at most 1, or `measured`"
        )
    return RankChoice(share, _PRODUCTS[products])


def parse_ranks(text: str | None, products: str = "both") -> list[RankChoice | None]:
    """Choices from the command line, separated by commas; ``[None]``: nothing is cut.

    Raises:
        UsageError: naming the option.
    """
    if text is None:
        return [None]
    return [parse_rank(part.strip(), products) for part in text.split(",")]


def _check(shape: AttentionShape, choice: RankChoice) -> None:
    if "qk" not in choice.products:
        return
    reason = ""
    if shape.qk_norm:
        reason = "QK-norm is applied between W_Q and W_K, so W_QK is not a single product"
    elif shape.rotary_dim:
        reason = "rotary positions are applied between W_Q and W_K, so W_QK is not a single product"
    elif shape.group > 1:
        reason = "query heads share keys, so W_K cannot be cut for each of them"
    if reason:
        raise UsageError(f"--attention-rank: {reason}; cut W_VP with --attention-product vp")


def cut_product(a: Tensor, b: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Balanced factors of the best approximation of A·Bᵀ of rank ``keep``.

    Args:
        a: ``[..., d_out, r]``.
        b: ``[..., d_in, r]``.
        keep: ``[...]`` int64.

    Returns:
        float64 factors of the same shapes; columns from ``keep`` on are zero.
    """
    width = min(a.shape[-2], b.shape[-2], a.shape[-1])
    q_a, r_a = torch.linalg.qr(a.double())
    q_b, r_b = torch.linalg.qr(b.double())
    u, sigma, v = torch.linalg.svd(r_a @ r_b.mT, full_matrices=False)
    kept = torch.arange(width) < keep[..., None]
    roots = torch.where(kept, sigma, 0.0).sqrt()[..., None, :]
    cut = (q_a @ u * roots, q_b @ v.mT * roots)
    missing = a.shape[-1] - width
    left, right = (torch.nn.functional.pad(factor, (0, missing)) for factor in cut)
    return left, right


class CutCheckpoint(Checkpoint):
    """A checkpoint whose attention products are cut; every other tensor is unchanged."""

    def __init__(self, path: Path, choice: RankChoice, smaller: bool = False) -> None:
        """
        Args:
            smaller: make heads as narrow as the largest rank that is kept, instead of zero columns.

        Raises:
            UsageError: if a product of this model cannot be cut.
        """
        super().__init__(path)
        if choice.threshold is None:
            choice = replace(choice, threshold=self.config.ranks.threshold)
        self.choice, self.smaller = choice, smaller
        self.shape = self.config.model.attention_shape
        _check(self.shape, choice)
        self._layer, self._tensors = -1, dict[str, Tensor]()
        self.head_size = self.shape.head_size
        if smaller:
            layers = range(self.shape.num_layers)
            widest = max(int(self._keeps(layer).max()) for layer in layers)
            self.head_size = widest + widest % 2  # classes with rotary code need an even width

    def full(self, name: str, key: str = MASTER) -> Tensor:
        """As `Checkpoint.full`, with the attention cut."""
        parts = name.split(".")
        of_attention = len(parts) == 5 and parts[2] == "attention" and parts[3] in ATTENTION_PARTS
        if not of_attention or name == f"blocks.{parts[1]}.attention.output.bias" or key != MASTER:
            return super().full(name, key)
        layer = int(parts[1])
        if layer != self._layer:
            self._layer, self._tensors = layer, self._cut(layer)
        return self._tensors[".".join(parts[3:])]

    def local(self, info: ParameterInfo, key: str, rank: int, size: int) -> Tensor:
        """As `Checkpoint.local`, cut from the whole tensor."""
        if ".attention." not in info.name:
            return super().local(info, key, rank, size)
        values = self.full(info.name, key)
        if info.partition_dim is not None and size > 1:
            values = values.chunk(size, info.partition_dim)[rank]
        return values.reshape(-1)

    def _keeps(self, layer: int) -> Tensor:
        """Ranks kept by (product, key/value head), of the weights without biases, as in the
        probe."""
        return torch.stack([self._keep(layer, product) for product in ("qk", "vp")])

    def _keep(self, layer: int, product: str) -> Tensor:
        full_widths = torch.full((self.shape.key_value_heads,), self.shape.head_size)
        if product not in self.choice.products or self.choice.share == 1.0:
            return full_widths
        factors = Factors.of_layer(self.shape, *self._weights(layer))
        if product == "qk":
            a, b = factors.key.mT, factors.query[:, 0].mT
        else:
            a, b = factors.output.flatten(1, 2), factors.value.mT
        return self.choice.keep(product_statistics(a, b).singular_values)

    def _weights(self, layer: int) -> list[Tensor]:
        names = (f"blocks.{layer}.attention.{part}.weight" for part in ATTENTION_PARTS)
        return [super(CutCheckpoint, self).full(name) for name in names]

    def _cut(self, layer: int) -> dict[str, Tensor]:
        query, key, value, output = self._augmented(layer)
        if self.choice.share != 1.0 and "qk" in self.choice.products:
            a, b = cut_product(key.mT, query[:, 0].mT, self._keep(layer, "qk"))
            key, query = a.mT, b.mT.unsqueeze(1)
        if self.choice.share != 1.0 and "vp" in self.choice.products:
            units, group, width, head = output.shape
            stacked = output.reshape(units, group * width, head)
            a, b = cut_product(stacked, value.mT, self._keep(layer, "vp"))
            output, value = a.reshape(units, group, width, head), b.mT
        size = self.head_size
        factors = Factors(query[..., :size, :], key[..., :size, :], value[..., :size, :],
                          output[..., :size])  # fmt: skip
        matrices = [matrix.float().contiguous() for matrix in factors.matrices()]
        if not self.config.model.biases:
            return {
                f"{part}.weight": matrix
                for part, matrix in zip(ATTENTION_PARTS, matrices, strict=True)
            }
        tensors = {"output.weight": matrices[3]}
        for part, matrix in zip(ATTENTION_PARTS[:3], matrices, strict=False):
            tensors[f"{part}.weight"] = matrix[:, :-1].contiguous()
            tensors[f"{part}.bias"] = matrix[:, -1].contiguous()
        return tensors

    def _augmented(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The layer's factors with the biases as a last column of the inputs."""
        full = super().full
        matrices = []
        for part in ATTENTION_PARTS:
            values = full(f"blocks.{layer}.attention.{part}.weight")
            if self.config.model.biases and part != "output":
                bias = full(f"blocks.{layer}.attention.{part}.bias")
                values = torch.cat([values, bias[:, None]], 1)
            matrices.append(values)
        factors = Factors.of_layer(self.shape, *matrices)
        return factors.query, factors.key, factors.value, factors.output


def settings_of(checkpoint: Checkpoint, choice: RankChoice | None) -> dict[str, Any]:
    """The cut, in the form of ``evaluation.json``; empty if nothing is cut."""
    if choice is None:
        return {}
    share = "measured" if choice.share is None else choice.share
    settings: dict[str, Any] = {
        "attention_rank": share,
        "attention_products": list(choice.products),
    }
    if isinstance(checkpoint, CutCheckpoint) and choice.share is None:
        settings["attention_threshold"] = checkpoint.choice.threshold
    return settings

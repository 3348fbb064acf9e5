"""A product whose input the backward pass computes again is the same product, bit by bit."""

from __future__ import annotations

import random
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.activated import activated_linear, activation
from models.config import ActivationFunction

KINDS: tuple[ActivationFunction, ...] = get_args(ActivationFunction)


@pytest.mark.parametrize("seed", range(30))
def test_values_and_gradients(seed: int) -> None:
    """Of any shape, with and without a bias, some tensors without a gradient."""
    chance = random.Random(seed)
    kind = KINDS[seed % 3]
    dtype = (torch.float32, torch.bfloat16)[seed % 2]
    shape = [chance.randint(1, 5) for _ in range(chance.randint(1, 3))]
    rows, width = chance.randint(1, 40), chance.randint(1, 40)
    draw = torch.Generator().manual_seed(seed)

    def drawn(*sizes: int) -> Tensor:
        made = torch.randn(sizes, generator=draw).to(dtype)
        return made.requires_grad_(chance.random() < 0.75)

    parts = tuple(drawn(*shape, width) for _ in range(2 if kind == "swiglu" else 1))
    weight, bias = drawn(rows, width), drawn(rows) if chance.random() < 0.5 else None
    found = activated_linear(kind, parts, weight, bias)
    wanted = F.linear(activation(kind, parts), weight, bias)
    assert torch.equal(found, wanted)
    inputs = [one for one in (*parts, weight, bias) if one is not None and one.requires_grad]
    if not inputs:
        return
    upstream = torch.randn(wanted.shape, generator=draw).to(dtype)
    for one, other in zip(
        torch.autograd.grad(found, inputs, upstream),
        torch.autograd.grad(wanted, inputs, upstream), strict=True,
    ):  # fmt: skip
        assert one.shape == other.shape and torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept(kind: ActivationFunction) -> None:
    """The weight and the parts; not what the activation function returns."""
    parts = tuple(torch.randn(3, 8, requires_grad=True) for _ in range(1 + (kind == "swiglu")))
    weight = torch.randn(4, 8, requires_grad=True)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        activated_linear(kind, parts, weight, None)
    assert sorted(kept) == sorted(one.data_ptr() for one in (weight, *parts))

"""One product with several weights is each product by itself."""

from __future__ import annotations

import itertools
import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.operations import Operations
from models.config import GPTConfig
from models.gpt import GPT
from models.joined import linear_in_one
from models.kernels import Kernels
from models.layers import ParameterFactory
from models.loss import mean_loss
from models.roles import info_of
from tests.tools import DIALECTS


def drawn(rows: list[int], width: int, has_biases: bool) -> tuple[tuple[Tensor, ...], ...]:
    """Weights and biases in float64."""
    draw = torch.Generator().manual_seed(sum(rows) + width)
    weights, biases = (
        tuple(torch.nn.Parameter(torch.randn(*shape, generator=draw).double()) for shape in shapes)
        for shapes in ([(count, width) for count in rows], [(count,) for count in rows])
    )
    return weights, biases if has_biases else ()


def apart(x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor, ...]) -> Tensor:
    pairs = itertools.zip_longest(weights, biases)
    return torch.cat([F.linear(x, weight, bias) for weight, bias in pairs], -1)


@pytest.mark.parametrize("seed", range(20))
def test_values_and_gradients(seed: int) -> None:
    chance = random.Random(seed)
    rows = [chance.randint(1, 9) for _ in range(chance.randint(1, 4))]
    width, has_biases = chance.randint(1, 7), chance.random() < 0.5
    shape = [chance.randint(1, 4) for _ in range(chance.randint(1, 3))]
    weights, biases = drawn(rows, width, has_biases)
    frozen = [chance.random() < 0.25 for _ in (*weights, *biases)]
    for parameter, stays in zip((*weights, *biases), frozen, strict=True):
        parameter.requires_grad_(not stays)
    x = torch.randn(*shape, width, dtype=torch.float64, requires_grad=chance.random() < 0.8)
    found = linear_in_one(x, weights, biases)
    wanted = apart(x, weights, biases)
    torch.testing.assert_close(found, wanted)
    if not wanted.requires_grad:
        return
    upstream = torch.randn_like(wanted)
    inputs = [one for one in (x, *weights, *biases) if one.requires_grad]
    for one, other in zip(
        torch.autograd.grad(found, inputs, upstream),
        torch.autograd.grad(wanted, inputs, upstream), strict=True,
    ):  # fmt: skip
        assert one.shape == other.shape
        torch.testing.assert_close(one, other)


def test_it_is_one_product() -> None:
    weights, biases = drawn([3, 2, 2], 4, True)
    with Operations() as counted:
        linear_in_one(torch.randn(2, 5, 4).double(), weights, biases).sum().backward()
    products = {name: n for name, n in counted.counts.items() if "mm" in name}
    assert products == {"aten.addmm.default": 1, "aten.mm.default": 1}  # x needs no gradient


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_model_is_the_same(dialect: str, compiles: bool) -> None:
    """Loss and gradients in float64, with moved biases, of both forms."""
    config = GPTConfig.model_validate({
        **DIALECTS[dialect], "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4,
        "context": 12, "vocabulary_size": 50,
    })  # fmt: skip
    tokens = torch.randint(50, (3, 13), generator=torch.Generator().manual_seed(1))
    losses, gradients = [], []
    for joined in (False, True):
        kernels = Kernels(joined=joined, compiled=compiles)
        model = GPT(config, ParameterFactory(1), kernels).double()
        draw = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
        loss = model(tokens[:, :-1], partial(mean_loss, labels=tokens[:, 1:]))
        loss.backward()
        losses.append(loss.detach())
        gradients.append({info_of(one).name: one.grad for one in model.parameters()})
    # The loss is float32; the gradients inside the blocks are float64.
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0.0)
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], wanted, rtol=1e-5, atol=1e-7, msg=name)

"""Blocks in a chain compute what they compute one by one, and keep no more memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.kept import kept
from models.block import Chain
from models.config import GPTConfig
from models.gpt import GPT
from models.kernels import Kernels
from models.layers import ParameterFactory
from models.loss import _steps, mean_loss
from tests.tools import DIALECTS

WIDTH, CONTEXT, BATCH = 32, 12, 3
MODELS: dict[str, dict[str, Any]] = {
    **DIALECTS,
    "parallel": {"parallel_residual": True},
    "without MLP": {"mlp": False},
    "linear attention": {"attention": "linear"},
}


def config_of(**more: Any) -> GPTConfig:
    return GPTConfig.model_validate({
        "num_layers": 3, "hidden_size": WIDTH, "num_attention_heads": 4, "context": CONTEXT,
        "vocabulary_size": 50, **more,
    })  # fmt: skip


def drawn(length: int) -> Tensor:
    """Tokens ``[batch, length]``."""
    return torch.randint(50, (BATCH, length), generator=torch.Generator().manual_seed(1))


def trained(model: GPT, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss, and all gradients."""
    loss = model(tokens[:, :-1], partial(mean_loss, labels=tokens[:, 1:]))
    loss.backward()
    gradients = {name: one.grad for name, one in model.named_parameters()}
    return loss.detach(), {name: one for name, one in gradients.items() if one is not None}


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_chain_is_its_blocks(name: str, documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, gradients and logits, bit by bit, if nothing is compiled."""
    monkeypatch.setattr("models.block.compiled", lambda function, _: function)
    monkeypatch.setattr("models.loss._compiled_steps", lambda: _steps)
    tokens, found = drawn(CONTEXT + 1), []
    for recompute in (False, True):  # recomputed blocks are in no chain
        kernels = Kernels(compiled=True, recompute=recompute)
        begins = 0 if documents else None
        model = GPT(config_of(**MODELS[name]), ParameterFactory(1), kernels, begins)
        assert any(isinstance(one, Chain) for one in model.functions) is not recompute
        with torch.no_grad():
            logits = model(tokens[:, :-1])
        found.append((*trained(model, tokens), logits))
    (loss, gradients, logits), (other_loss, others, other_logits) = found
    assert torch.equal(loss, other_loss) and torch.equal(logits, other_logits)
    assert gradients.keys() == others.keys() == {name for name, _ in model.named_parameters()}
    assert [key for key, one in gradients.items() if not torch.equal(one, others[key])] == []


@pytest.mark.long
@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_chain(name: str, selective: bool) -> None:
    tokens, config = drawn(CONTEXT + 1), config_of(**MODELS[name])
    (loss, gradients), (other_loss, others) = (
        trained(GPT(config, ParameterFactory(1), kernels).double(), tokens)
        for kernels in (Kernels(compiled=True, selective=selective), Kernels())
    )
    torch.testing.assert_close(loss, other_loss, rtol=1e-6, atol=0.0)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[key], rtol=1e-5, atol=1e-7, msg=key)


def test_one_code_serves_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler would make a second one if tensors differed in shape, strides or gradient."""
    seen = []

    def noted(function: Any, _: bool) -> Any:
        def run(x: Tensor, more: Tensor, starts: Tensor | None) -> Any:
            seen.append(tuple((one.shape, one.stride(), one.requires_grad) for one in (x, more)))
            return function(x, more, starts)

        return run

    monkeypatch.setattr("models.block.compiled", noted)
    monkeypatch.setattr("models.loss._compiled_steps", lambda: _steps)
    for dialect in DIALECTS.values():
        seen.clear()
        trained(GPT(config_of(**dialect), ParameterFactory(1), Kernels(compiled=True)), drawn(9))
        assert len(seen) == 3 and len(set(seen)) == 1


def passed(model: GPT) -> Tensor:
    """The hidden states after the last norm."""
    x: Any = drawn(CONTEXT)
    for function in model.functions[:-1]:
        x = function(x)
    hidden: Tensor = x
    return hidden


def kept_by_a_layer(kernels: Kernels, dtype: torch.dtype, **more: Any) -> float:
    """In units of a hidden state."""
    models = (
        GPT(config_of(num_layers=layers, **more), ParameterFactory(1), kernels).to(dtype)
        for layers in (2, 4)
    )
    sizes = [kept(partial(passed, model), model) for model in models]
    return (sizes[1] - sizes[0]) / 2 / (BATCH * CONTEXT * WIDTH * dtype.itemsize)


@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_layer_keeps(joined: bool, dtype: torch.dtype, selective: bool) -> None:
    """Inputs and outputs of two norms (4), queries, keys and values (3), mixed values (1, and
    without their mean 1 in bf16), the MLP's (8, or 4 without GELU's values), and small tensors."""
    layer = kept_by_a_layer(Kernels(joined=joined, selective=selective), dtype, dialect="gpt2")
    wanted = 16 + (dtype == torch.bfloat16) - 4 * selective
    assert wanted <= layer <= wanted + 1


@pytest.mark.long
@pytest.mark.parametrize("dialect", DIALECTS)
def test_compiled_code_computes_no_product_again(dialect: str) -> None:
    """It keeps at least a quarter less with `selective`, and has as many products."""
    found, products = [], []
    for selective in (False, True):
        kernels = Kernels(compiled=True, selective=selective)
        found.append(kept_by_a_layer(kernels, torch.float32, **DIALECTS[dialect]))
        model = GPT(config_of(**DIALECTS[dialect]), ParameterFactory(1), kernels)
        trained(model, drawn(CONTEXT + 1))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            trained(model, drawn(CONTEXT + 1))
        names = [event.name for event in profile.events()]
        products.append([names.count(f"aten::{name}") for name in ("mm", "addmm", "bmm")])
    assert found[1] < 0.75 * found[0] and products[0] == products[1] and sum(products[0]) > 30

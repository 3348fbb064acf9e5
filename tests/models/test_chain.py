"""Blocks in a chain compute what they compute one by one, and keep no more memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

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
    monkeypatch.setattr("models.block.compiled", lambda function: function)
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
@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_chain(name: str) -> None:
    tokens, config = drawn(CONTEXT + 1), config_of(**MODELS[name])
    (loss, gradients), (other_loss, others) = (
        trained(GPT(config, ParameterFactory(1), Kernels(compiled=compiles)).double(), tokens)
        for compiles in (True, False)
    )
    torch.testing.assert_close(loss, other_loss, rtol=1e-6, atol=0.0)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[key], rtol=1e-5, atol=1e-7, msg=key)


def test_one_code_serves_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler would make a second one if tensors differed in shape, strides or gradient."""
    seen = []

    def noted(function: Any) -> Any:
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


def kept(model: GPT) -> int:
    """Bytes that the layers keep for the backward pass, without parameters."""
    parameters = {one.untyped_storage().data_ptr() for one in model.parameters()}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        x: Any = drawn(CONTEXT)
        for function in model.functions[:-1]:
            x = function(x)
    return sum(sizes.values())


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_layer_keeps_for_the_backward_pass(joined: bool, dtype: torch.dtype) -> None:
    """In units of a hidden state: inputs and outputs of two norms (4), queries, keys, values (3),
    mixed values (1, and without their mean 1 in bf16), the MLP's (8), and some small tensors."""
    sizes = []
    for layers in (2, 4):
        config = config_of(num_layers=layers, dialect="gpt2")
        sizes.append(kept(GPT(config, ParameterFactory(1), Kernels(joined=joined)).to(dtype)))
    layer = (sizes[1] - sizes[0]) / 2 / (BATCH * CONTEXT * WIDTH * dtype.itemsize)
    assert layer <= (16 if dtype == torch.float32 else 17) + 1

"""Attention inside documents: a sequence of documents equals each document alone."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import GPTConfig
from models.documents import (
    attention_by_flex,
    block_mask,
    document_starts,
    positions_of,
    same_document,
)
from models.gpt import GPT
from models.kernels import Kernels
from models.layers import ParameterFactory
from models.loss import mean_loss
from models.products import attention_by_products
from models.roles import info_of

END, SIZE, CONTEXT, BATCH = 3, 90, 200, 3
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"dialect": "gpt2"},
    "gpt_neox": {"dialect": "gpt_neox"},
    "llama": {"dialect": "llama", "num_key_value_heads": 2},
    "qk_norm": {"dialect": "llama", "qk_norm": True, "tied_head": True},
    "no positions": {"dialect": "gpt2", "position": "none"},
    "linear": {"dialect": "gpt2", "attention": "linear"},
    "sigmoid": {"dialect": "gpt_neox", "attention": "sigmoid"},
    "both directions": {"dialect": "gpt_neox", "causal": False},
    "sigmoid both directions": {"dialect": "gpt2", "attention": "sigmoid", "causal": False},
}


def model(name: str, kernels: Kernels = Kernels()) -> GPT:  # noqa: B008 - frozen
    config = GPTConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, context=CONTEXT,
        vocabulary_size=SIZE, **MODELS[name],
    )  # fmt: skip
    built = GPT(config, ParameterFactory(5), kernels, begins=END)
    with torch.no_grad():
        for parameter in built.parameters():  # biases too, and large enough to be seen
            draw = torch.Generator().manual_seed(parameter.numel())
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    return built


def sequences(seed: int) -> Tensor:
    """Tokens with documents of all lengths: of one token, cut at either end, as long as a row."""
    chance = random.Random(seed)
    rows = torch.randint(
        END + 1, SIZE, (BATCH, CONTEXT), generator=torch.Generator().manual_seed(seed)
    )
    for row in range(1, BATCH):
        for place in chance.sample(range(CONTEXT), chance.choice([1, 4, 30])):
            rows[row, place] = END
    rows[1, :2] = END
    return rows


def documents(row: list[int]) -> list[tuple[int, int]]:
    """First and last position + 1 of each document, by a loop."""
    begins = [i for i, token in enumerate(row) if token == END or i == 0]
    return list(zip(begins, [*begins[1:], len(row)], strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_a_sequence_of_documents_is_each_alone(name: str) -> None:
    """Logits and the gradients of every parameter."""
    built, tokens = model(name), sequences(1)
    labels = tokens.roll(-1, 1)
    built.train()
    together = built(tokens)
    loss = mean_loss_of(built, tokens, labels)
    found = gradients(built, loss)
    built.eval()
    total = torch.zeros(())
    for row in range(BATCH):
        for first, last in documents(tokens[row].tolist()):
            alone = tokens[row : row + 1, first:last]
            wanted = built(alone)[:, 0]
            assert torch.allclose(together[first:last, row], wanted, rtol=1e-5, atol=1e-5)
            one = mean_loss_of(built, alone, labels[row : row + 1, first:last])
            total = total + one * (last - first) / tokens.numel()
    for key, gradient in gradients(built, total).items():
        scale = gradient.abs().max()
        assert (found[key] - gradient).abs().max() <= 1e-5 * scale + 1e-8, key
    assert len(documents(tokens[1].tolist())) > 2


def mean_loss_of(built: GPT, tokens: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = built(tokens, partial(mean_loss, labels=labels))
    return loss


def gradients(built: GPT, loss: Tensor) -> dict[str, Tensor]:
    built.zero_grad()
    loss.backward()
    return {info_of(p).name: p.grad.clone() for p in built.parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "kernels",
    [
        Kernels(recompute=True),
        Kernels(attention="products"),
        pytest.param(Kernels(compiled=True), marks=pytest.mark.long),
    ],
)
def test_kernels_change_nothing(kernels: Kernels) -> None:
    tokens = sequences(2)
    labels = tokens.roll(-1, 1)
    found = []
    for one in (model("llama"), model("llama", kernels)):
        one.train()
        found.append(gradients(one, mean_loss_of(one, tokens, labels)))
    for key, gradient in found[0].items():
        assert torch.allclose(found[1][key], gradient, rtol=1e-5, atol=1e-7), key


def test_an_evaluation_sees_one_document() -> None:
    """Outside of training, the token that ends documents is one as any other."""
    built = model("gpt2")
    plain = GPT(built.config, ParameterFactory(5))
    plain.load_state_dict(built.state_dict())
    built.eval()
    assert torch.equal(built(sequences(1)), plain(sequences(1)))


def test_starts_and_masks_by_loops() -> None:
    tokens = sequences(3)
    starts = document_starts(tokens, END)
    seen = {causal: same_document(starts, causal) for causal in (False, True)}
    dense = block_mask(starts).to_dense()[:, 0].bool()
    for row in range(BATCH):
        for first, last in documents(tokens[row].tolist()):
            for i in range(first, last):
                assert starts[row, i] == first and positions_of(starts)[row, i] == i - first
                assert seen[False][row, 0, i].nonzero().flatten().tolist() == [*range(first, last)]
                assert seen[True][row, 0, i].nonzero().flatten().tolist() == [*range(first, i + 1)]
                assert dense[row, i // 128, first // 128 : i // 128 + 1].all()


@pytest.mark.parametrize("length", [64, 128, 200, 384])
def test_the_gpus_kernel_has_the_same_formula(length: int) -> None:
    """Its mask in blocks is PyTorch's own; uncompiled, it computes what matrix products do."""
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = torch.randint(END + 1, SIZE, (2, length), generator=torch.Generator().manual_seed(1))
    tokens[0, [5, length // 2, length - 1]] = END
    starts = document_starts(tokens, END)
    made = block_mask(starts)
    wanted = create_block_mask(made.mask_mod, 2, None, length, length, device="cpu")
    for part in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        assert torch.equal(visible(made, part), visible(wanted, part)), part
    draw = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 3, length, 16, generator=draw) for _ in range(3))
    found = attention_by_flex(q, k, v, starts)
    assert torch.allclose(found, attention_by_products(q, k, v, True, starts), atol=1e-6)


def visible(mask: Any, part: str) -> Tensor:
    """A part of a block mask, without the numbers of blocks that it does not use."""
    values: Tensor = getattr(mask, part)
    if part.endswith("num_blocks"):
        return values.expand(2, 1, -1)
    counts = getattr(mask, part.replace("indices", "num_blocks")).unsqueeze(-1)
    used = torch.arange(values.shape[-1]) < counts
    return torch.where(used, values, -1)

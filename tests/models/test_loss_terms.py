"""z-loss and bounded logits, against PyTorch's own derivatives in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import models.loss
from models.config import GPTConfig
from models.export import class_of
from models.gpt import GPT
from models.kernels import Kernels
from models.layers import ParameterFactory
from models.loss import Projection, mean_loss, token_losses
from models.roles import ModelError

TERMS = [(0.0, 3.0), (0.05, 0.0), (0.05, 3.0)]


@pytest.mark.parametrize(("z_loss", "softcap"), TERMS)
@pytest.mark.parametrize(
    "kind", ["whole", "in parts", pytest.param("compiled", marks=pytest.mark.long)]
)
def test_terms_of_the_loss(
    kind: str, z_loss: float, softcap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The value is the cross-entropy alone; the gradient is that of both terms."""
    monkeypatch.setattr(models.loss, "_LEAST_ROWS", 15 if kind == "whole" else 4)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 3, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    weight = 2 * torch.randn(12, 8, generator=draw, dtype=torch.float64)
    weight.requires_grad_()
    bias = torch.tensor([0.0] * 11 + [-torch.inf])  # one row of padding
    labels = torch.randint(0, 11, (3, 5), generator=draw)
    labels[0, 1] = -1  # not asked
    logits = (hidden @ weight.T).transpose(0, 1).flatten(0, 1)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits + bias
    targets = labels.flatten()
    normaliser = logits.logsumexp(-1)[targets >= 0]
    wanted = F.cross_entropy(logits, targets, ignore_index=-1)
    gradients = torch.autograd.grad(
        2 * (wanted + z_loss * normaliser.square().mean()), (hidden, weight)
    )
    single = [one.detach().float().requires_grad_() for one in (hidden, weight)]
    kernels = Kernels(loss_bytes=0, compiled=kind == "compiled")
    projection = Projection(single[0], single[1], bias, kernels=kernels, softcap=softcap)
    found = mean_loss(projection, labels, partial_labels=True, z_loss=z_loss)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    for one, other in zip(torch.autograd.grad(2 * found, single), gradients, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)
    each = F.cross_entropy(logits, targets.clamp_min(0), reduction="none").view(3, 5)
    losses = token_losses(projection, labels.t().clamp_min(0)).t()
    torch.testing.assert_close(losses.double(), each, rtol=1e-5, atol=1e-6)
    shown = projection.logits().transpose(0, 1).flatten(0, 1)
    torch.testing.assert_close(shown.double(), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dialect", ["gpt2", "llama"])
def test_a_model_bounds_its_logits(dialect: str) -> None:
    shape: dict[str, Any] = {
        "dialect": dialect, "num_layers": 1, "hidden_size": 16, "num_attention_heads": 2,
        "context": 8, "vocabulary_size": 30, "init_std": 2.0,
    }  # fmt: skip
    plain = GPT(GPTConfig(**shape), ParameterFactory(1))
    config = GPTConfig(**shape, logit_softcap=5.0)
    tokens = torch.arange(8).unsqueeze(0)
    logits = plain(tokens)[..., :30]
    assert logits.abs().max() > 6
    found = GPT(config, ParameterFactory(1))(tokens)[..., :30]
    torch.testing.assert_close(found, 5 * torch.tanh(logits / 5))
    with pytest.raises(ModelError, match="logit_softcap"):  # no class of ours computes this
        class_of(config)

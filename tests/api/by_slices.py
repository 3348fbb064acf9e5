"""λ of fused matrices by explicit slices, and steps with zero gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.transformers_models import FAMILIES, build

WORDS: dict[str, Any] = {
    "default": 0.1, "query": 0.5, "key": 0.3, "value": 0.2, "attention_output": 0.7, "mlp": 0.05,
}  # fmt: skip
RATE, STEPS = 1e-2, 5
HEADS = 3
"""Of GPT-NeoX here: an odd number, so that two processes cut one in the middle."""


def mostly_long(everyday: str, *others: str) -> list[Any]:
    """Families of which one is tried every day, and the others in the long form."""
    return [everyday, *(pytest.param(one, marks=pytest.mark.long) for one in others)]


def build_odd(family: str) -> Any:
    """A small model; GPT-NeoX with `HEADS` heads."""
    if family != "gpt_neox":
        return build(family)
    usual = FAMILIES[family]
    FAMILIES[family] = (*usual[:2], usual[2] | {"num_attention_heads": HEADS})
    try:
        return build(family)
    finally:
        FAMILIES[family] = usual


def factor(decay: float) -> float:
    """What is left of a weight after the steps."""
    return (1.0 - RATE * decay) ** STEPS


def expected(name: str, before: Tensor) -> Tensor:
    """A parameter after the steps, from its name in transformers and nothing of ours."""
    w, after = WORDS, before.double().clone()
    q, k, v = factor(w["query"]), factor(w["key"]), factor(w["value"])
    if name.endswith("c_attn.weight"):  # GPT-2: [in, q | k | v]
        third = before.shape[1] // 3
        after[:, :third] *= q
        after[:, third : 2 * third] *= k
        after[:, 2 * third :] *= v
    elif name.endswith("query_key_value.weight"):  # GPT-NeoX: q, k and v of each head
        head = before.shape[0] // 3 // HEADS
        for number in range(HEADS):
            start = 3 * head * number
            after[start : start + head] *= q
            after[start + head : start + 2 * head] *= k
            after[start + 2 * head : start + 3 * head] *= v
    elif ".q_proj." in name:
        after *= q
    elif ".k_proj." in name:
        after *= k
    elif ".v_proj." in name:
        after *= v
    elif ".o_proj." in name or "attn.c_proj.weight" in name or "attention.dense.weight" in name:
        after *= factor(w["attention_output"])
    elif "mlp" in name and name.endswith("weight") and before.dim() == 2:
        after *= factor(w["mlp"])
    elif before.dim() == 2:
        after *= factor(w["default"])
    return after


def whole(parameter: Tensor) -> Tensor:
    """A copy of all of a parameter."""
    gathered: Any = getattr(parameter.detach(), "full_tensor", parameter.detach)()
    return gathered.clone()  # type: ignore[no-any-return]


def worst_after_zero_gradients(
    model: nn.Module, optimizer: torch.optim.Optimizer, backward: bool = False
) -> float:
    """The largest deviation from `expected`, as a share of a parameter's largest weight.

    Args:
        backward: gradients come from a backward pass, multiplied by 0, as wrappers need it.
    """
    bare = getattr(model, "module", model)
    before = {name: whole(one) for name, one in bare.named_parameters()}
    tokens = torch.arange(32).view(2, 16) % 64
    for _ in range(STEPS):
        if backward:
            (0.0 * model(input_ids=tokens, labels=tokens).loss).backward()
        else:
            for parameter in bare.parameters():
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    worst = 0.0
    for name, parameter in bare.named_parameters():
        difference = whole(parameter).double() - expected(name, before[name])
        worst = max(worst, float(difference.abs().max() / before[name].abs().max().clamp_min(1e-9)))
    return worst

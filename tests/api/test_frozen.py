"""Models of which a part is not trained: it is measured as any, and its decay is none."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pretrain.api.groups import decay_groups
from pretrain.api.probe import RankProbe
from pretrain.errors import UsageError
from pretrain.report.load import load_study
from tests.transformers_models import build

FROZEN = {"a matrix": "q_proj", "a block": "layers.0.", "attention": "self_attn"}
RATE = 1e-2


def model_without(words: str) -> nn.Module:
    model: nn.Module = build("llama").train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(words not in name)
    return model


def trained(model: nn.Module, optimizer: Any, probe: RankProbe) -> None:
    tokens = torch.arange(32).view(2, 16) % 64
    for step in (1, 2):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        probe.step(step, loss=loss)


@pytest.mark.parametrize(
    ("part", "by"),
    [
        ("a matrix", "groups"),
        ("a block", "optimizer"),
        *(
            pytest.param(part, by, marks=pytest.mark.long)
            for part in FROZEN
            for by in ("groups", "optimizer")
        ),
    ],
)
def test_a_frozen_part_is_measured_without_decay(part: str, by: str, tmp_path: Path) -> None:
    model = model_without(FROZEN[part])
    before = copy.deepcopy(model.state_dict())
    decay: Any
    if by == "groups":
        decay = decay_groups(model, default=0.1)
        optimizer = decay.attach(torch.optim.AdamW(decay, lr=RATE))
    else:
        some = [one for one in model.parameters() if one.requires_grad]
        decay = optimizer = torch.optim.AdamW(some, lr=RATE, weight_decay=0.1)
    with RankProbe(model, tmp_path / "run", steps=2, every=1, decay=decay) as probe:
        trained(model, optimizer, probe)
        rows = [row for row in probe.measure(2) if row["product"] == "qk"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    none, ours = (0.0, 0.0, 1.0), (0.1, 2 * RATE * 0.1, (1 - RATE * 0.1) ** 2)
    for row in rows:
        query = none if part != "a block" or row["layer"] == 0 else ours
        key = ours if part == "a matrix" else query
        for side, wanted in (("a", key), ("b", query)):
            found = [row[f"{name}_{side}"] for name in ("decay", "exposure", "retention")]
            assert found == pytest.approx(wanted)
        assert row["nuclear_norm"] > 0
    assert load_study([tmp_path / "run"])


def test_what_another_optimizer_trains_is_not_known() -> None:
    model = build("llama").train()
    ours = [one for name, one in model.named_parameters() if "q_proj" in name]
    probe = RankProbe(model, decay=torch.optim.AdamW(ours, lr=RATE, weight_decay=0.1))
    row = next(row for row in probe.measure(0) if row["product"] == "qk")
    exposures = sorted((row["exposure_a"], row["exposure_b"]), key=math.isnan)
    assert exposures[0] == 0.0 and math.isnan(exposures[1])


def test_nothing_to_train_is_told_in_one_line() -> None:
    model = model_without("")
    with pytest.raises(UsageError, match="every parameter is frozen"):
        decay_groups(model, default=0.1)
    model.lm_head.weight.requires_grad_(True)  # type: ignore[union-attr]
    with pytest.raises(UsageError, match=r"no such parameters.*; \d+ frozen parameters"):
        decay_groups(model, default=0.1, attention=0.5)

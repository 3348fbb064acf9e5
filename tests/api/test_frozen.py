"""Models of which a part is not trained: it is measured as any, and its decay is none."""

from __future__ import annotations

import copy
import math
import random
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

pytestmark = pytest.mark.slow

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


SIDES = {"qk": ("k_proj", "q_proj"), "vp": ("o_proj", "v_proj")}


@pytest.mark.parametrize("by", ["groups", "optimizer"])
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 12))]
)
def test_the_table_and_the_report_have_what_was_applied(by: str, seed: int, tmp_path: Path) -> None:
    """Gradients are zero, so that weights only decay; matrices freeze and thaw at random."""
    draw, steps = random.Random(seed), 6
    model = build("llama").train()
    matrices = {name: one for name, one in model.named_parameters() if "self_attn" in name}
    never = set(draw.sample(sorted(matrices), draw.randint(1, 3)))
    before = {name: one.detach().clone() for name, one in matrices.items()}
    exposure = dict.fromkeys(matrices, 0.0)
    decay: Any
    for name in never:
        matrices[name].requires_grad_(False)
    if by == "groups":
        decay = decay_groups(model, default=0.1)
        optimizer = decay.attach(torch.optim.AdamW(decay, lr=RATE))
    else:
        decay = optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    about: Any = {"steps": steps, "every": 1, "learning_rate": 1.0}
    with RankProbe(model, tmp_path / "run", decay=decay, **about) as probe:
        for step in range(1, steps + 1):
            rate = draw.uniform(0.5, 2)
            for name, one in matrices.items():
                one.requires_grad_(name not in never and (step == 1 or draw.random() < 0.6))
                one.grad = torch.zeros_like(one) if one.requires_grad else None
                exposure[name] += 0.1 * rate * one.requires_grad
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            probe.step(step, loss=1.0, learning_rate=rate)
        last = probe.measure(steps)
    for row in last:
        for side, module in zip("ab", SIDES[row["product"]], strict=True):
            name = f"model.layers.{row['layer']}.self_attn.{module}.weight"
            left = float(matrices[name].norm() / before[name].norm())
            assert row[f"retention_{side}"] == pytest.approx(left, rel=1e-5), name
            assert row[f"exposure_{side}"] == pytest.approx(exposure[name], abs=1e-12), name
            assert row[f"frozen_{side}"] == (not matrices[name].requires_grad)
    (run,) = load_study([tmp_path / "run"]).runs
    wanted = [
        exposure[name]
        for row in last
        if row["level"] == "head"
        for module in SIDES[row["product"]]
        if (name := f"model.layers.{row['layer']}.self_attn.{module}.weight") not in never
    ]
    assert run.exposure == pytest.approx(sum(wanted) / len(wanted))


def test_a_report_leaves_out_what_is_not_trained(tmp_path: Path) -> None:
    """The mean λ is of trained matrices: those with λ = 0 count, frozen ones do not."""
    model = model_without("layers.0.self_attn")
    decay = decay_groups(model, default=0.1, attention=0.3, key=0.0)
    optimizer = decay.attach(torch.optim.AdamW(decay, lr=RATE))
    with RankProbe(model, tmp_path / "run", steps=2, every=1, decay=decay) as probe:
        trained(model, optimizer, probe)
    (run,) = load_study([tmp_path / "run"]).runs
    assert run.decay == pytest.approx(0.3 * 3 / 4)
    assert run.exposure == pytest.approx(0.3 * 3 / 4 * 2 * RATE)


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

"""Norms by layer and role, and the largest attention logits, on every grid."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

import models.logits
from models.config import GPTConfig
from models.gpt import GPT, attention_layers
from models.layers import ParameterFactory
from models.logits import largest_logit, watched_logits
from pretrain.runs.metrics import read_metrics
from tests.tools import base_recipe, losses_of, run, run_workers, write_recipe

GRIDS: dict[int, list[dict[str, Any]]] = {
    1: [{"zero_stage": 0}, {"zero_stage": 1}, {"zero_stage": 2}, {"zero_stage": 3}],
    2: [{"zero_stage": 0}, {"zero_stage": 1}, {"zero_stage": 3},
        {"zero_stage": 2, "tensor_parallel": 2},
        {"zero_stage": 1, "tensor_parallel": 2, "sequence_parallel": True},
        {"zero_stage": 1, "pipeline_parallel": 2}],
    4: [{"zero_stage": 1, "tensor_parallel": 2}, {"zero_stage": 1, "pipeline_parallel": 2},
        {"zero_stage": 3, "tensor_parallel": 2}],
}  # fmt: skip
SHORT: list[dict[str, Any]] = [
    {"zero_stage": 1}, {"zero_stage": 2, "tensor_parallel": 2},
    {"zero_stage": 1, "pipeline_parallel": 2}, {"zero_stage": 3, "tensor_parallel": 2},
]  # fmt: skip
"""Of several processes, the grids of the short form."""
FORMS: list[dict[str, Any]] = [
    {"default": 0.1},
    {"default": 0.5, "form": "cautious"},
    {"default": 0.5, "form": "l2"},
]


def recipe(data: Path, grid: dict[str, Any], decay: dict[str, Any]) -> dict[str, Any]:
    values = deepcopy(base_recipe(data))
    values["model"]["vocabulary_size"] = 90
    values["train"] = {"steps": 4, "global_batch": 8, "micro_batch": 2}
    values["precision"], values["grid"] = "fp32", grid
    values["optimizer"] |= {"weight_decay": decay, "epsilon": 1e-4}
    return values


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{name}/{key}")
    else:
        yield name, tree


@pytest.mark.slow
def test_norms_are_those_of_a_plain_computation(
    data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Where tensors are divided, and by layers; in the short form on half of the grids."""
    everything = request.config.getoption("--long")
    asked, answers = {}, {}
    for processes, grids in GRIDS.items():
        asked[processes] = [
            {"recipe": recipe(data, grid, decay)}
            for number, grid in enumerate(grids)
            if everything or processes == 1 or grid in SHORT
            for decay in (
                FORMS if processes == 1 and (everything or number == 0) else FORMS[number % 3 :][:1]
            )
        ]
        answers[processes] = run_workers(processes, "norms", asked[processes], tmp_path)
    reference = {
        str(case["recipe"]["optimizer"]): answer
        for case, answer in zip(asked[1][:3], answers[1][:3], strict=True)
    }
    for processes, cases in asked.items():
        for case, answer in zip(cases, answers[processes], strict=True):
            wanted = reference[str(case["recipe"]["optimizer"])]
            if answer["by hand"] is not None and "l2" not in str(case):
                assert dict(leaves(answer["norms"])) == pytest.approx(
                    dict(leaves(answer["by hand"])), rel=1e-4, abs=1e-9
                )
            assert dict(leaves(answer["norms"])) == pytest.approx(
                dict(leaves(wanted["norms"])), rel=2e-4, abs=1e-7
            ), case
            if "pipeline_parallel" in case["recipe"]["grid"]:
                assert answer["logits"] == {}
            else:
                assert answer["logits"].keys() == wanted["logits"].keys()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block", [1, 3, 256])
def test_the_largest_logit_is_that_of_a_whole_matrix(
    causal: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.logits, "_QUERIES", block)
    draw = torch.Generator().manual_seed(block)
    for _ in range(20):
        q, k = (torch.randn(2, 3, 7, 4, generator=draw) for _ in range(2))
        seen = torch.ones(7, 7, dtype=torch.bool)
        seen = seen.tril() if causal else seen
        logits = (q @ k.mT) / 2.0
        assert float(largest_logit(q, k, causal)) == pytest.approx(float(logits[..., seen].max()))
        starts = torch.tensor([[0, 0, 2, 2, 2, 5, 5], [0, 0, 0, 0, 4, 4, 4]])
        same = (starts.unsqueeze(-1) == starts.unsqueeze(-2)) & seen
        inside = logits.masked_fill(~same.unsqueeze(1), float("-inf")).max()
        assert float(largest_logit(q, k, causal, starts)) == pytest.approx(float(inside))


def test_watching_ends_with_its_block() -> None:
    shape = GPTConfig(dialect="llama", num_layers=2, hidden_size=32, num_attention_heads=4,
                      num_key_value_heads=2, context=16, vocabulary_size=40)  # fmt: skip
    model, tokens = GPT(shape, ParameterFactory(1)), torch.arange(16).view(1, 16)
    with torch.no_grad(), watched_logits(model) as found:
        model(tokens)
    assert sorted(found) == [0, 1]
    with torch.no_grad():
        model(tokens * 2)
    assert all(layer.watch is None for layer in attention_layers(model))


def test_a_run_logs_them(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", base_recipe(data))
    words = ["train", str(path), "--out", str(tmp_path / "run"), "logging.norms=2"]
    assert run(monkeypatch, *words) == 0
    rows = read_metrics(tmp_path / "run", "norms")
    assert [row["step"] for row in rows] == [2, 4, 6]
    for row in rows:
        assert row["weights"]["query"].keys() == {"layer_00", "layer_01"}
        assert row["weights"]["embedding"].keys() == {"outside"}
        assert row["largest_logit"].keys() == {"layer_00", "layer_01"}
        assert all(value >= 0 for name, value in leaves(row["updates"]))
    losses = losses_of(tmp_path / "run")
    words[3:] = [str(tmp_path / "other"), "logging.norms=0"]
    assert run(monkeypatch, *words) == 0
    assert (losses == losses_of(tmp_path / "other")).all()
    assert not read_metrics(tmp_path / "other", "norms")

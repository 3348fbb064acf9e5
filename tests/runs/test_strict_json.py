"""Files that the product writes are JSON to every parser, and no update comes of a lost loss."""

from __future__ import annotations

import ast
import json
import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.strict_json import not_finite, to_json
from models.config import GPTConfig
from models.gpt import GPT
from models.layers import ParameterFactory
from models.loss import mean_loss
from pretrain.config.recipe import Config
from pretrain.runs.folder import read_evaluation
from pretrain.runs.follow import Follower
from pretrain.runs.metrics import METRICS, Tracker, read_metrics
from tests.tools import ROOT


def strict(text: str) -> Any:
    """As parsers of other languages: no NaN, no Infinity."""

    def refuse(word: str) -> None:
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


def value_of(draw: random.Random, depth: int) -> Any:
    """Any value of JSON, with the numbers that are none."""
    kind = draw.randrange(8 if depth else 5)
    if kind < 5:
        odd = (math.nan, math.inf, -math.inf, -0.0, 1e308, 5e-324)
        return (None, True, draw.randint(-(2**70), 2**70), draw.choice(odd), 'é\n"')[kind]
    parts = [value_of(draw, depth - 1) for _ in range(draw.randrange(4))]
    return (parts, tuple(parts), dict(zip("abc", parts, strict=False)))[kind - 5]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_written_is_json(seed: int) -> None:
    value = value_of(random.Random(seed), 4)

    def same(found: Any, given: Any) -> bool:
        if isinstance(given, float) and not math.isfinite(given):
            return found is None
        if isinstance(given, dict):
            return all(same(found[key], part) for key, part in given.items())
        if isinstance(given, list | tuple):
            return all(map(same, found, given))
        return bool(found == given)

    found = strict(to_json(value))
    assert same(found, value)
    assert bool(not_finite(value)) == any(word in json.dumps(value) for word in ("NaN", "Inf"))


def test_no_file_is_written_by_anything_else() -> None:
    """Each other `json.dumps` of the product makes a hash, a key, a page's data or a header."""
    allowed = {
        "data_pipeline/strict_json.py", "data_pipeline/corpus.py",  # text alone
        "data_pipeline/fast_tokenizer.py", "data_pipeline/json_tokenizer.py",  # of a library
        "pretrain/checkpoint/tensor_file.py", "pretrain/distributed/watchdog.py",
        "pretrain/report/interactive.py", "pretrain/report/tables.py", "pretrain/report/load.py",
        "pretrain/sweep/config.py", "pretrain/report/context_tables.py",  # keys
        "pretrain/api/commands.py",  # words of a command
    }  # fmt: skip
    found = set()
    for folder in ("pretrain", "data_pipeline", "models", "launchers"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            hashed = {
                id(inner)
                for call in ast.walk(tree)
                if isinstance(call, ast.Call) and "sha256" in ast.unparse(call.func)
                for inner in ast.walk(call)
            }
            for call in ast.walk(tree):
                if isinstance(call, ast.Call) and id(call) not in hashed:
                    name = ast.unparse(call.func)
                    if name.startswith("json") and name.endswith((".dumps", ".dump")):
                        found.add(path.relative_to(ROOT).as_posix())
    assert not found - allowed


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_metrics_are_json_and_say_what_was_lost(tmp_path: Path, bad: float) -> None:
    tracker = Tracker(tmp_path, Config(), active=True)
    tracker.log("train", 3, {"loss": bad, "weight_decay": {"query": 0.1}})
    tracker.log("evaluation", 3, {"loss": 2.0, "perplexity": bad})
    tracker.log("ranks", 3, {"gap": math.nan})  # does not apply
    tracker.close()
    for line in (tmp_path / METRICS).read_text().splitlines():
        strict(line)
    messages = [row["message"] for row in read_metrics(tmp_path, "event")]
    assert messages == [
        f"train: loss not finite, null in {METRICS}",
        f"evaluation: perplexity not finite, null in {METRICS}",
    ]
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["loss"]) and row["weight_decay"] == {"query": 0.1}
    present = Follower(tmp_path).look()
    assert present.step == 3 and present.loss is not None and math.isnan(present.loss)
    tracker.active = True
    tracker.rewind(3)
    assert len((tmp_path / METRICS).read_text().splitlines()) == 5


def test_an_evaluation_is_read_back(tmp_path: Path) -> None:
    body = {"overall": {"loss": math.inf, "tokens": 3}, "pile_weighted": None, "subsets": {}}
    path = tmp_path / "evaluation.json"
    path.write_text(to_json(body))
    strict(path.read_text())
    found = read_evaluation(path)
    assert math.isnan(found["overall"]["loss"]) and found["pile_weighted"] is None


@pytest.mark.parametrize("dialect", ["gpt2", "gpt_neox", "llama"])
@pytest.mark.parametrize("partly", [True, False])
def test_a_lost_loss_loses_every_gradient(dialect: str, partly: bool) -> None:
    """A label of the vocabulary's padding: the loss is infinite, its own gradient is finite."""
    model = GPTConfig.model_validate(
        {"dialect": dialect, "num_layers": 1, "hidden_size": 16, "num_attention_heads": 2,
         "context": 8, "vocabulary_size": 100}
    )  # fmt: skip
    module = GPT(model, ParameterFactory(1))
    tokens = torch.arange(16).view(2, 8)
    for label, lost in ((5, False), (127, True)):
        labels = tokens.clone()
        labels[1, 3] = label
        module.zero_grad()
        loss = module(tokens, partial(mean_loss, labels=labels, partial_labels=partly))
        loss.backward()
        assert bool(loss.isfinite()) != lost
        for parameter in module.parameters():
            assert parameter.grad is not None
            assert bool(parameter.grad.isfinite().all()) != lost

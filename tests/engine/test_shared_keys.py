"""More tensor-parallel processes than key/value heads: the numbers are those of one process."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.gpt import GPT
from models.layers import ParameterFactory, own_keys
from models.parallel import TensorParallel
from models.roles import ModelError, info_of
from pretrain.config.recipe import parse_config
from tests.decay.test_decay_applied import LAMBDAS, decays
from tests.models.test_models import config
from tests.tools import (
    base_recipe,
    check_theory,
    losses_of,
    metrics_of,
    run_workers,
    spectra_of,
    weights_of,
)

STEPS = 6
SHAPE = {"dialect": "llama", "num_layers": 1, "hidden_size": 64, "num_attention_heads": 8,
         "num_key_value_heads": 1, "context": 16, "vocabulary_size": 100}  # fmt: skip
BIASED = {"dialect": "gpt2"}
ROTARY = {"dialect": "llama", "qk_norm": True}
MUON = {"name": "muon"}
NUCLEAR = {"weight_decay": {"default": 0.1, "attention": 0.02, "form": {"attention": "nuclear"}}}
ALPHA = {"weight_decay": {"policies": [
    {"kind": "alpha", "roles": ["attention"], "refresh": 2, "min_eigenvalues": 8}]}}  # fmt: skip
ADADECAY = {"weight_decay": {"default": 0.5, "form": "adadecay"}}
CASES: dict[int, list[tuple[str, int, dict[str, Any], dict[str, Any], dict[str, Any]]]] = {
    # name, key/value heads, model, grid, optimizer
    2: [
        ("one", 1, ROTARY, {"tensor_parallel": 2, "zero_stage": 1}, {}),
        ("biases", 1, BIASED, {"tensor_parallel": 2, "sequence_parallel": True}, NUCLEAR),
        ("muon", 1, ROTARY, {"tensor_parallel": 2}, MUON),
    ],
    4: [
        ("two", 2, ROTARY, {"tensor_parallel": 4, "zero_stage": 0}, {}),
        ("four to one", 1, BIASED, {"tensor_parallel": 4}, NUCLEAR),
        ("data", 1, ROTARY, {"tensor_parallel": 2, "zero_stage": 1}, ALPHA),
        ("zero 3", 1, BIASED, {"tensor_parallel": 2, "zero_stage": 3}, ADADECAY),
        ("zero 2", 1, ROTARY, {"tensor_parallel": 2, "zero_stage": 2}, MUON),
        ("pipeline", 1, ROTARY, {"tensor_parallel": 2, "pipeline_parallel": 2}, NUCLEAR),
        ("sequence", 2, ROTARY, {"tensor_parallel": 4, "sequence_parallel": True}, {}),
    ],
}


def recipe_of(
    data: Path, heads: int, model: dict[str, Any], grid: dict[str, Any], optimizer: dict[str, Any]
) -> dict[str, Any]:
    values = deepcopy(base_recipe(data))
    values["model"] |= model | {"num_key_value_heads": heads}
    values["train"] = {"steps": STEPS, "global_batch": 8, "micro_batch": 2}
    values["grid"] = grid
    values["optimizer"] |= optimizer
    return values


def compare(found: Path, wanted: Path) -> None:
    """Losses, norms, every master and moment, and the statistics of each head."""
    np.testing.assert_allclose(losses_of(found), losses_of(wanted), rtol=1e-5)
    norms = [
        np.array([row["grad_norm"] for row in metrics_of(run) if row["kind"] == "train"])
        for run in (found, wanted)
    ]
    np.testing.assert_allclose(norms[0], norms[1], rtol=5e-5)
    mine, other = weights_of(found), weights_of(wanted)
    assert mine.keys() == other.keys()
    for name, value in other.items():
        assert mine[name].shape == value.shape
        if "key.bias" in name:
            continue  # softmax ignores a key bias: its gradient is rounding noise
        scale = np.abs(value).max() + 1e-12
        assert np.abs(mine[name] - value).max() / scale < 2e-3, name
    spectra, expected = spectra_of(found), spectra_of(wanted)
    assert spectra.keys() == expected.keys() and check_theory(found) == check_theory(wanted)
    for head, sigma in expected.items():
        assert np.abs(spectra[head] - sigma).max() / sigma[0] < 1e-4, head


def trained(data: Path, folder: Path, processes: int) -> None:
    cases = CASES[processes]
    for count, name in ((1, "alone"), (processes, "divided")):
        requests = [
            {"recipe": recipe_of(data, heads, model, grid if count > 1 else {}, optimizer),
             "run": str(folder / f"{case}-{name}")}
            for case, heads, model, grid, optimizer in cases
        ]  # fmt: skip
        run_workers(count, "train", requests, folder / f"workers-{count}")
    for case, *_ in cases:
        compare(folder / f"{case}-divided", folder / f"{case}-alone")


@pytest.mark.long
@pytest.mark.parametrize("processes", CASES)
def test_the_numbers_are_those_of_one_process(data: Path, tmp_path: Path, processes: int) -> None:
    trained(data, tmp_path, processes)


@pytest.mark.long
def test_any_grid_reads_any_checkpoint(data: Path, tmp_path: Path) -> None:
    """Four processes share two heads, then two hold one each, then one holds both, and back."""
    legs: list[tuple[int, dict[str, Any]]] = [
        (4, {"tensor_parallel": 4}),
        (2, {"tensor_parallel": 2, "zero_stage": 1}),
        (1, {}),
        (4, {"tensor_parallel": 4, "zero_stage": 1}),
    ]
    recipe = recipe_of(data, 2, ROTARY, {}, {})
    recipe["train"]["steps"], recipe["checkpoint"] = 8, {"every": 2, "keep": 0}
    recipe["ranks"] = {"every": 8, "spectra": True}
    run_workers(1, "train", [{"recipe": recipe, "run": str(tmp_path / "still")}], tmp_path / "w")
    for leg, (processes, grid) in enumerate(legs):
        moved: list[dict[str, Any]] = [
            {"recipe": {**recipe, "grid": grid}, "run": str(tmp_path / "moved"),
             "stop": 2 * (leg + 1)}
        ]  # fmt: skip
        if leg:
            weight_decay = {"default": 0.2, "attention": 0.7, "mlp": 0.1}
            changed = deepcopy(moved[0]["recipe"])
            changed["optimizer"]["weight_decay"] = weight_decay
            changed["train"]["steps"] = 10
            stored = tmp_path / f"moved/checkpoints/step-{2 * leg:08d}"
            moved.insert(0, {"task": "decay", "recipe": changed, "checkpoint": str(stored),
                             "decays": decays(weight_decay)})  # fmt: skip
        answers = run_workers(processes, "train", moved, tmp_path / "w")
        if leg:
            assert answers[0]["worst"] < 1e-6, grid
    compare(tmp_path / "moved", tmp_path / "still")


@pytest.mark.long
def test_zero_gradients(data: Path, tmp_path: Path) -> None:
    """λ of replicated keys and values, as each process's optimizer applies it."""
    for processes, cases in CASES.items():
        requests = []
        for _, heads, model, grid, _ in cases:
            biased = model["dialect"] == "gpt2"
            rules = {word: value for word, value in LAMBDAS.items() if biased or word != "bias"}
            recipe = recipe_of(data, heads, model, grid, {"weight_decay": rules})
            recipe["model"]["tied_head"] = False
            recipe["train"]["steps"] = 10
            requests.append({"recipe": recipe, "decays": decays(rules)})
        for answer in run_workers(processes, "decay", requests, tmp_path):
            assert answer["worst"] < 1e-6


@pytest.mark.parametrize(
    ("heads", "size"), [(1, 2), (1, 4), (2, 4), (4, 4), (4, 2), (1, 8), (4, 8)]
)
def test_every_process_has_the_head_of_its_queries(heads: int, size: int) -> None:
    shape = config("llama", num_attention_heads=8, hidden_size=64, num_key_value_heads=heads)
    group = 8 // heads
    for rank in range(size):
        tp = TensorParallel(rank=rank, size=size)
        with torch.device("meta"):
            model = GPT(shape, ParameterFactory(0, tp, "shape", "meta"))
        infos = {info_of(p).name: (p, info_of(p)) for p in model.parameters()}
        key, info = infos["blocks.0.attention.key.weight"]
        assert info.shape == (heads * 8, 64)
        queries = range(rank * 8 // size, (rank + 1) * 8 // size)
        wanted = sorted({query // group for query in queries})
        if size <= heads:
            assert info.partition_dim == 0
            assert wanted == list(range(rank * heads // size, (rank + 1) * heads // size))
            continue
        assert info.partition_dim is None and key.shape == info.shape
        own = own_keys(shape, tp)
        assert [(own.start // 8), own.stop - own.start] == [*wanted, 8]


def test_heads_that_divide_in_no_way_are_refused() -> None:
    """Neither a head for each process nor a number of processes for each head."""
    values = {"num_attention_heads": 12, "hidden_size": 96, "num_key_value_heads": 6}
    with torch.device("meta"), pytest.raises(ModelError, match=r"num_key_value_heads: 6 .*=4"):
        GPT(config("llama", **values), ParameterFactory(0, TensorParallel(size=4), "shape"))
    assert parse_config({"model": SHAPE, "grid": {"tensor_parallel": 8}})

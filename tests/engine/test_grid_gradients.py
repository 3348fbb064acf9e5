"""Gradients in bf16 on every axis of the grid against float64 on one process, by parameter."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.dataset import TrainingData
from data_pipeline.manifest import load_manifest
from models.gpt import GPT
from models.layers import ParameterFactory
from models.loss import mean_loss
from models.roles import info_of
from pretrain.config.recipe import parse_config
from pretrain.tasks.text import Text
from tests.engine.test_grid_sums import gradients_of
from tests.models.test_bf16 import MOST, SHAPE, TEXT, TOKENS
from tests.moved import moved_constants
from tests.tools import base_recipe, run_workers

CONTEXT = 128
MODELS: dict[str, dict[str, Any]] = {
    **TEXT,
    "qk_norm": {**TEXT["llama"], "qk_norm": True},
    "qk_norm_layernorm": {**TEXT["gpt_neox"], "qk_norm": True, "position": "rotary"},
    "tied": {**TEXT["gpt2"], "tied_head": True},
    "linear": {**TEXT["gpt2"], "attention": "linear"},
    "sigmoid": {**TEXT["gpt_neox"], "attention": "sigmoid", "qk_norm": True},
}
TENSOR, SEQUENCE = {"tensor_parallel": 2}, {"tensor_parallel": 2, "sequence_parallel": True}
PIPELINE: dict[str, Any] = {"pipeline_parallel": 2}
GRIDS: dict[str, tuple[int, dict[str, Any]]] = {
    # name: (processes, grid)
    "one": (1, {}),
    "data": (2, {}),
    "tensor": (2, TENSOR),
    "sequence": (2, SEQUENCE),
    "pipeline": (2, PIPELINE),
    "tensor-pipeline": (4, TENSOR | PIPELINE),
    "sequence-pipeline": (4, SEQUENCE | PIPELINE),
    "sequence-data": (4, SEQUENCE),
    "sequence-4": (4, SEQUENCE | {"tensor_parallel": 4}),
    "sequence-recompute": (2, SEQUENCE | {"activation_checkpointing": True}),
    "sequence-zero-3": (2, SEQUENCE | {"zero_stage": 3}),
}


def recipe_for(data: Path, model: dict[str, Any], grid: dict[str, Any]) -> dict[str, Any]:
    """One update of SGD in one pass: its momentum is then the gradient of all tokens."""
    values = deepcopy(base_recipe(data))
    values["model"] = SHAPE | {"context": CONTEXT} | model
    values["train"] = {"steps": 1, "global_batch": TOKENS // CONTEXT}
    values["precision"], values["grid"] = "bf16", {"zero_stage": 1} | grid
    values["optimizer"] = {"name": "sgd", "learning_rate": 1e-3, "gradient_clipping": 0}
    values["ranks"] = {"every": 1}
    values["evaluation"] = {"every": 1, "documents": 1, "at_end": "none"}
    values["checkpoint"]["every"] = 1
    return values


def exact_gradients(values: dict[str, Any]) -> dict[str, np.ndarray]:
    """In float64 on this process, of the weights as bf16 holds them."""
    config = parse_config(values)
    manifest = load_manifest(Path(config.data.path))
    model = Text(manifest).complete(config.model)
    count = config.train.global_batch
    samples = TrainingData(manifest, "proportional", model.context, config.seed, count)
    rows = [samples[number] for number in range(count)]
    inputs, labels = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    with moved_constants():
        module = GPT(model, ParameterFactory(config.seed)).bfloat16().double()
    module(inputs, partial(mean_loss, labels=labels)).backward()
    return {info_of(one).name: one.grad.numpy() for one in module.parameters()}  # type: ignore[union-attr]


def errors(found: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> dict[str, float]:
    """Relative error of the norm of every parameter's gradient."""
    assert found.keys() == exact.keys()
    norm = np.linalg.norm
    sizes = {name: float(norm(values)) for name, values in exact.items()}
    for name in [name for name in sizes if name.endswith("key.bias") and sizes[name] < 1e-9]:
        # It adds the same to all scores of a query: its gradient is 0 but for rounding.
        sizes[name] = sizes[name.replace("key.bias", "query.bias")]
    far = {}
    for name, values in exact.items():
        rows = min(len(values), len(found[name]))  # a vocabulary's padding follows the grid
        assert not found[name][rows:].any() and not values[rows:].any()
        far[name] = float(norm(found[name][:rows] - values[:rows])) / sizes[name]
    return far


def check(data: Path, folder: Path, cases: list[tuple[str, str]]) -> None:
    """Every gradient of every (model, grid)."""
    recipes = {case: recipe_for(data, MODELS[case[0]], GRIDS[case[1]][1]) for case in cases}
    for processes in (1, 2, 4):
        requests = [
            {"recipe": recipe, "run": str(folder / "-".join(case)), "moved": True}
            for case, recipe in recipes.items()
            if GRIDS[case[1]][0] == processes
        ]
        if requests:
            run_workers(processes, "train", requests, folder / f"workers-{processes}")
    exact = {name: exact_gradients(recipes[name, grid]) for name, grid in cases}
    wrong: dict[Any, Any] = {}
    for case in cases:
        far = errors(gradients_of(folder / "-".join(case)), exact[case[0]])
        name, worst = max(far.items(), key=lambda item: item[1])
        print(f"{'-'.join(case)}: at most {worst:.2%} ({name})")
        wrong |= {(*case, name): error for name, error in far.items() if not error < MOST}
    assert not wrong, wrong


SAMPLE = [("sigmoid", "sequence")]


@pytest.mark.slow
def test_gradients_on_a_grid_are_within_two_percent(data: Path, tmp_path: Path) -> None:
    check(data, tmp_path, SAMPLE)


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
def test_every_gradient_on_every_grid(data: Path, tmp_path: Path, model: str) -> None:
    heads = SHAPE["num_attention_heads"]
    fitting = [
        (model, name)
        for name, (_, grid) in GRIDS.items()
        if heads % grid.get("tensor_parallel", 1) == 0  # more processes than heads are refused
    ]
    assert len(fitting) >= len(GRIDS) - 1
    check(data, tmp_path, fitting)

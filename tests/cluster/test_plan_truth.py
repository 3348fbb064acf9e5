"""The plan against training: grids that it accepts, and bytes that its collectives send."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from models.gpt import GPT
from models.layers import ParameterFactory
from models.parallel import TensorParallel
from pretrain.cluster.plan import Choice, rank
from pretrain.cluster.plan_traffic import traffic_of
from pretrain.config.recipe import Config, parse_config
from pretrain.distributed.grid import Grid, check_grid
from pretrain.engine.accelerators import DEVICES
from pretrain.engine.engine import micro_batches
from pretrain.engine.layout import layout_of
from pretrain.engine.sizes import sizes_of
from pretrain.errors import UsageError
from tests.tools import run_workers

RECIPES = 120
AXES: dict[str, list[Any]] = {
    "dialect": ["gpt2", "gpt_neox", "llama"],
    "layers": [1, 2, 3, 6],
    "heads": [4, 6, 8],
    "groups": [1, 2, 0],
    "ffn": [0, 96, 100, 129],
    "context": [30, 64, 129],
    "vocabulary": [97, 512],
    "batch": [6, 16, 24],
    "precision": ["auto", "bf16", "fp32"],
    "compile": [False, True],
    "sequence": [False, True],
    "optimizer": ["adamw", "sgd", "muon"],
    "zero_stage": [None, None, None, 0, 1, 2, 3],
    "tensor_parallel": [None, None, None, 1, 2, 4],
    "pipeline_parallel": [None, None, None, 1, 2],
    "activation_checkpointing": [None, None, False, True],
    "micro_batch": [0, 0, 0, 2, 4],
    "count": [1, 2, 4, 6, 8, 16],
}
GRID = ("zero_stage", "tensor_parallel", "pipeline_parallel", "activation_checkpointing")
FIELDS = dict(zip(GRID, ("zero_stage", "tensor", "pipeline", "recompute"), strict=True))


def drawn(seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A recipe, which may be one that training refuses, and what was drawn for it."""
    chance = random.Random(seed)
    one = {key: chance.choice(values) for key, values in AXES.items()}
    recipe = {
        "model": {
            "dialect": one["dialect"], "num_layers": one["layers"], "hidden_size": 48,
            "head_dim": 8, "num_attention_heads": one["heads"],
            "num_key_value_heads": one["groups"], "ffn_hidden_size": one["ffn"],
            "context": one["context"], "vocabulary_size": one["vocabulary"],
        },
        "train": {"global_batch": one["batch"], "micro_batch": one["micro_batch"]},
        "grid": {key: one[key] for key in GRID if one[key] is not None}
        | {"sequence_parallel": one["sequence"]},
        "speed": {"compile": one["compile"]},
        "optimizer": {"name": one["optimizer"]},
        "precision": one["precision"],
    }  # fmt: skip
    return recipe, one


def chosen(recipe: dict[str, Any], one: Choice) -> dict[str, Any]:
    """The recipe with the words that the plan prints."""
    grid = recipe["grid"] | {key: getattr(one, field) for key, field in FIELDS.items()}
    return recipe | {"grid": grid, "train": recipe["train"] | {"micro_batch": one.micro_batch}}


def trains(config: Config, count: int) -> None:
    """What training refuses of a grid, by building its first rank's model on no memory.

    Raises:
        UsageError, ModelError: as training does.
    """
    data = check_grid(config.grid, count)
    tensor, pipeline = config.grid.tensor_parallel, config.grid.pipeline_parallel
    micro_batches(config, Grid(tensor, pipeline, data, 0, torch.device("cpu"), None, None, None))
    place = TensorParallel(size=tensor, sequence_parallel=config.grid.sequence_parallel)
    GPT(config.model, ParameterFactory(0, place, "shape"))


@pytest.mark.parametrize("part", range(2))
def test_every_grid_of_a_plan_is_one_that_trains(part: int) -> None:
    """Random recipes: what is listed is accepted, and keeps every key that the recipe sets; where
    nothing is listed, no grid is accepted."""
    listed = 0
    for seed in range(part, RECIPES, 2):
        recipe, one = drawn(seed)
        try:
            config = parse_config(recipe)
            found = rank(config, DEVICES["h100"], one["count"])
        except (UsageError, ValueError) as error:
            assert "\n" not in str(error)
            assert not any(accepts(recipe, values, one["count"]) for values in every_grid(one))
            continue
        for choice in found:
            trains(parse_config(chosen(recipe, choice)), one["count"])
            assert choice.tensor * choice.pipeline * choice.data == one["count"]
            for key, field in FIELDS.items():
                assert one[key] is None or getattr(choice, field) == one[key]
            assert not one["micro_batch"] or choice.micro_batch == one["micro_batch"]
            stays = choice.zero_stage if one["precision"] == "auto" else one["precision"] == "bf16"
            assert choice.precision == ("bf16" if stays else "fp32")
        listed += len(found)
    assert listed > 20


SMALL: dict[str, Any] = {
    "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
              "vocabulary_size": 256, "context": 64},
    "train": {"steps": 4, "global_batch": 8},
}  # fmt: skip


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_plan_keeps_raw_keys(stage: int) -> None:
    config = parse_config(SMALL | {"deepspeed": {"zero_optimization": {"stage": stage}}})
    if stage == 0:  # in bf16 there is no such stage
        config = parse_config(SMALL | {"precision": "fp32"} | {
            "deepspeed": {"zero_optimization": {"stage": stage}}})  # fmt: skip
    assert {choice.zero_stage for choice in rank(config, DEVICES["h100"], 2)} == {stage}


def test_a_plan_refuses_rules_of_decay_that_match_nothing() -> None:
    rules = [{"roles": ["attention"], "layers": "90-99", "decay": 1.0}]
    config = parse_config(SMALL | {"optimizer": {"weight_decay": {"rules": rules}}})
    with pytest.raises(UsageError, match="has layer 90, but the layers of this model are 0-"):
        rank(config, DEVICES["h100"], 2)


def every_grid(one: dict[str, Any]) -> list[tuple[Any, ...]]:
    """All values of the keys of the grid that were left open."""
    count = one["count"]
    sizes = [n for n in range(1, count + 1) if count % n == 0]
    stages = [0, 1, 2, 3] if one["precision"] == "fp32" else [1, 2, 3]
    open_: tuple[list[Any], ...] = (stages, [n for n in sizes if n <= 8], sizes, [False, True])
    return list(itertools.product(*(
        values if one[key] is None else [one[key]]
        for key, values in zip(GRID, open_, strict=True)
    )))  # fmt: skip


def accepts(recipe: dict[str, Any], values: tuple[Any, ...], count: int) -> bool:
    try:
        grid = recipe["grid"] | dict(zip(GRID, values, strict=True))
        trains(parse_config(recipe | {"grid": grid}), count)
    except (UsageError, ValueError):
        return False
    return True


SCALARS = 256
"""Bytes of norms, flags and the loss that the plan leaves out."""
FREED = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}


def counted_recipes() -> list[dict[str, Any]]:
    """Grids of two processes: each ZeRO stage with one and four micro batches, and the others."""

    def recipe(micro: int, precision: str = "fp32", **grid: Any) -> dict[str, Any]:
        model = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "context": 32,
                 "vocabulary_size": 256}  # fmt: skip
        return {"model": model, "train": {"global_batch": 16, "micro_batch": micro}, "grid": grid,
                "precision": precision}  # fmt: skip

    def zero3(base: dict[str, Any], **more: int) -> dict[str, Any]:
        # Models as small as this would keep every tensor gathered for ever.
        raw = {"stage3_param_persistence_threshold": 0, **more}
        return base | {"deepspeed": {"zero_optimization": raw}}

    found = [recipe(micro, zero_stage=stage) for micro in (8, 2) for stage in (0, 1, 2)]
    found += [recipe(2, "bf16", zero_stage=stage) for stage in (1, 2)]
    found += [
        zero3(recipe(micro, zero_stage=3), **more) for micro in (8, 2) for more in ({}, FREED)
    ]
    found += [zero3(recipe(2, "bf16", zero_stage=3, activation_checkpointing=True), **FREED)]
    for sequence, recompute in itertools.product((False, True), repeat=2):
        found += [recipe(4, tensor_parallel=2, sequence_parallel=sequence,
                         activation_checkpointing=recompute)]  # fmt: skip
    found += [recipe(4, "bf16", tensor_parallel=2), recipe(4, pipeline_parallel=2)]
    found += [recipe(4, "bf16", pipeline_parallel=2)]
    found += [recipe(2, zero_stage=1) | {"optimizer": {"name": "muon"}}]
    found += [recipe(4, tensor_parallel=2) | {"optimizer": {"name": "muon"}}]
    untied = recipe(4, tensor_parallel=2, sequence_parallel=True)
    untied["model"] |= {"dialect": "llama", "num_key_value_heads": 2, "qk_norm": True}
    shared = [
        recipe(4, tensor_parallel=2, sequence_parallel=sequence) for sequence in (False, True)
    ]
    for one in shared:  # the processes share a key/value head
        one["model"] |= {"num_key_value_heads": 1}
    return [*found, untied, *shared]


def test_planned_bytes_are_those_that_collectives_send(tmp_path: Path) -> None:
    """On two processes, whatever ZeRO stage, accumulation, tensor, sequence or pipeline."""
    recipes = counted_recipes()
    answers = run_workers(2, "traffic", [{"recipe": one} for one in recipes], tmp_path)
    for recipe, sent in zip(recipes, answers, strict=True):
        config = parse_config(recipe)
        planned = traffic_of(sizes_of(config), layout_of(config, "cpu", 2, 0.0, 0.0))
        assert abs(sum(sent.values()) - sum(planned.values())) <= SCALARS, (recipe, sent, planned)
        assert sum(sent.values()) > 20 * SCALARS

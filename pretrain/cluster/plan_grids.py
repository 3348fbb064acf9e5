"""Finds the grids that `pretrain train` accepts for a recipe on N devices.

The rules are those of training itself: each grid is put into the recipe and checked by them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from models.gpt import layer_blueprints, whole_model
from models.kernels import DEFAULT_KERNELS
from models.layers import ParameterFactory
from models.roles import ModelError
from pretrain.config.recipe import Config, with_values
from pretrain.decay.control import DecayControl
from pretrain.decay.plan import plan_decay
from pretrain.engine.engine import refuse_unfit
from pretrain.engine.layout import empty_grid
from pretrain.engine.micro_batch import with_size
from pretrain.engine.sizes import check_vocabulary
from pretrain.errors import UsageError


def candidates(config: Config, device: str, per_node: int, count: int) -> Iterator[Config]:
    """The recipe with every grid and micro batch that training accepts on ``count`` devices.

    Keys that the recipe sets are kept; the others vary.

    Args:
        device: their type (cuda, cpu).
        per_node: devices per node; tensor parallelism is planned only within a node.

    Raises:
        UsageError: if there is no grid, with the first reason; or if the recipe itself is wrong.
    """
    check_vocabulary(config.model)
    infos = whole_model(config.model)
    DecayControl(config, plan_decay(infos, config.optimizer.weight_decay))
    refusals: list[str] = []
    empty = True
    for values in _grids(config, per_node, count):
        try:
            accepted = accept(with_values(config, values, "plan"), device, count)
        except (UsageError, ModelError) as error:
            refusals.append(str(error).removeprefix("plan: "))
            continue
        for recipe in _micro_batches(accepted, device, count):
            empty = False
            yield recipe
    if empty:
        _refuse(config, count, refusals)


def accept(config: Config, device: str, count: int) -> Config:
    """The recipe, after all checks that training makes before its first update.

    Raises:
        UsageError, ModelError: as training does.
    """
    grid = empty_grid(config, device, count)
    factory = ParameterFactory(0, grid.tensor_parallel, "shape")
    layer_blueprints(config.model, factory, DEFAULT_KERNELS)
    refuse_unfit(config, grid)
    return config


def _grids(config: Config, per_node: int, count: int) -> Iterator[dict[str, Any]]:
    """All combinations of the keys of ``grid`` that vary."""
    divisors = _divisors(count)
    stages = (0, 1, 2, 3) if config.precision == "fp32" else (1, 2, 3)  # auto at 0 is fp32
    for tensor in _free(config, "tensor_parallel", [n for n in divisors if n <= per_node]):
        for pipeline in _free(config, "pipeline_parallel", divisors):
            for stage in _free(config, "zero_stage", stages):
                for recompute in _free(config, "activation_checkpointing", (False, True)):
                    yield {
                        "grid.tensor_parallel": tensor,
                        "grid.pipeline_parallel": pipeline,
                        "grid.zero_stage": stage,
                        "grid.activation_checkpointing": recompute,
                    }


def _free(config: Config, key: str, values: Any) -> Any:
    """All values of a key of ``grid``, or the one that the recipe sets."""
    return [getattr(config.grid, key)] if key in config.grid.model_fields_set else values


def _micro_batches(config: Config, device: str, count: int) -> Iterator[Config]:
    if config.train.micro_batch:  # or auto, which `plan.choose` resolves
        yield config
        return
    share = config.train.global_batch // empty_grid(config, device, count).data
    for micro in _divisors(share):
        yield with_size(config, micro)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _refuse(config: Config, count: int, refusals: list[str]) -> None:
    if any(text.startswith("train.global_batch") for text in refusals):
        raise UsageError(
            f"train.global_batch: {config.train.global_batch} sequences cannot be divided by any "
            f"grid of {count} devices; change one of them"
        )
    raise UsageError(f"no grid of {count} devices is accepted: {refusals[0]}")

"""Combines a recipe with its data, before a model is built."""

from __future__ import annotations

from dataclasses import dataclass

from models.gpt import whole_model
from models.roles import ParameterInfo
from pretrain.config.recipe import Config
from pretrain.decay.control import DecayControl
from pretrain.decay.lengths import check_lengths
from pretrain.decay.plan import DecayPlan, plan_decay
from pretrain.engine.raw_deepspeed import check_raw
from pretrain.tasks.task import Task
from pretrain.tasks.tasks import open_task


@dataclass(frozen=True)
class Setup:
    """A recipe with its task, its parameters and their λ."""

    config: Config
    task: Task
    infos: list[ParameterInfo]
    plan: DecayPlan


def prepare(
    config: Config, tensor_parallel: int, known: Config | None = None, task: Task | None = None
) -> Setup:
    """Check a recipe against its data and plan the decay, without building anything.

    Args:
        known: the recipe of the existing run, if there is one.
        task: the recipe's task, if it is open.

    Raises:
        UsageError: if the data is missing or does not fit the model.
    """
    check_raw(config.deepspeed)
    check_lengths(config, known)
    task = task or open_task(config)
    config = config.model_copy(update={"model": task.complete(config.model)})
    infos = whole_model(config.model, tensor_parallel)
    plan = plan_decay(infos, config.optimizer.weight_decay)
    DecayControl(config, plan)  # its policies must fit the model, too
    return Setup(config, task, infos, plan)

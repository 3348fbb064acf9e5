"""Builds the modules of a model in the memory that training needs anyway, without values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from models.gpt import GPT, layer_blueprints
from models.layers import ParameterFactory, Storage
from pretrain.config.recipe import Config
from pretrain.distributed.grid import Grid
from pretrain.engine.deepspeed_adapter import ModelParallelUnit, pipeline_module, silent
from pretrain.engine.passes import Loss
from pretrain.engine.speed import choose_kernels


def build_model(
    config: Config,
    grid: Grid,
    loss: Loss | None = None,
    eod: int | None = None,
    storage: Storage = "empty",
    built: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """This process's part of the model, without values: the whole, or a `PipelineModule` stage.

    Args:
        config: with its precision resolved.
        loss: the loss function of the last stage of a pipeline.
        eod: the token between documents, for training inside them if the recipe says so.
        storage: of the parameters, in the working precision on the grid's device.
        built: is called with each layer before the next one is built.
    """
    factory = ParameterFactory(
        config.seed, grid.tensor_parallel, storage, grid.device, working_type(config)
    )
    kernels = choose_kernels(config, grid)
    begins = eod if config.data.attention == "within" else None
    if grid.pipeline == 1:
        return GPT(config.model, factory, kernels, begins, built).to(grid.device)
    return pipeline_module(layer_blueprints(config.model, factory, kernels, begins), grid, loss)


def working_type(config: Config) -> torch.dtype:
    """The type of weights and activations in a recipe whose precision is resolved."""
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


class LayerDivider:
    """Divides each layer among the data-parallel processes as soon as it is built (ZeRO 3).

    So no process ever holds more than one layer whole.

    Args:
        settings: of DeepSpeed.
    """

    def __init__(self, settings: dict[str, Any], grid: Grid, precision: torch.dtype) -> None:
        self._settings, self._grid, self._precision = settings, grid, precision
        self._divided: Any = None
        """A parameter that DeepSpeed has divided, which can divide others in the same way."""

    def __call__(self, layer: nn.Module) -> None:
        """Divide the parameters of a layer; a collective call."""
        parameters = list(layer.parameters())
        if not parameters:
            return
        if self._divided is not None:
            self._divided.convert_to_zero_parameters(param_list=parameters)
            return
        import deepspeed

        # Dividing asks DeepSpeed for process ranks before an engine has connected it to torch.
        deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        unit = ModelParallelUnit(self._grid)
        with silent():
            deepspeed.zero.Init(
                module=layer,
                data_parallel_group=unit.get_data_parallel_group(),
                dtype=self._precision,
                config_dict_or_path=self._settings,
                mpu=unit,
            )
        self._divided = parameters[0]

"""Adapts DeepSpeed: its settings, its interface to a grid, and corrections of its behaviour.

Everything here uses private parts of DeepSpeed; nothing here depends on the model.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from data_pipeline.light_imports import import_light
from models.gpt import LayerBlueprint
from models.roles import info_of
from pretrain.config.recipe import Config
from pretrain.distributed.grid import Grid
from pretrain.engine.libraries import ignore_old_names
from pretrain.engine.masters import is_tied_copy
from pretrain.engine.norms import square_sum
from pretrain.engine.private import Case, Holder, check_private
from pretrain.engine.raw_deepspeed import check_offload, check_raw
from pretrain.errors import UsageError

_BUCKET = 500_000_000
"""DeepSpeed's default number of elements that it reduces at once."""
_SUB_GROUP = 100_000_000
"""Number of elements of ZeRO 3 that are cast or updated at once. DeepSpeed's default of 10⁹ holds a
second float32 copy of almost all masters at the start of a large model."""


def deepspeed_settings(
    config: Config, grid: Grid, micro: int, count: int, parameters: int
) -> dict[str, Any]:
    """The DeepSpeed configuration that the recipe implies, with the raw block merged in.

    Args:
        config: with its precision resolved.
        micro, count: sequences per micro batch, and micro batches per update, of a process.
        parameters: how many parameters this process holds.

    Raises:
        UsageError: if a raw key contradicts the recipe or is not known to work.
    """
    implied: dict[str, Any] = {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": count,
        "gradient_clipping": config.optimizer.gradient_clipping,
        "zero_optimization": {"stage": config.grid.zero_stage},
        "bf16": {"enabled": config.precision == "bf16"},
        # Sums in bf16 would lose digits with every micro batch and every process.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        # By default a tensor-parallel process sends its share of an activation and gathers the
        # rest, as if all held the same; under sequence parallelism each holds different positions.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own would be compiled at run time
        "steps_per_print": 10**12,
    }
    raw = config.deepspeed
    chosen = raw.get("zero_optimization") or {}
    if config.grid.zero_stage == 3 and "sub_group_size" not in chosen:
        implied["zero_optimization"]["sub_group_size"] = _SUB_GROUP
    if "reduce_bucket_size" not in chosen:
        # DeepSpeed allocates this many elements, by default 1 GB, however small the model is.
        implied["zero_optimization"]["reduce_bucket_size"] = min(parameters, _BUCKET)
    check_raw(raw)
    check_offload(raw, config.grid.zero_stage)
    return _merge(implied, raw, "deepspeed")


def _merge(base: dict[str, Any], raw: dict[str, Any], path: str) -> dict[str, Any]:
    merged = dict(base)
    for key, value in raw.items():
        if isinstance(value, dict) and isinstance(base.get(key, {}), dict):
            merged[key] = _merge(base.get(key, {}), value, f"{path}.{key}")
        elif key in base and base[key] != value:
            raise UsageError(
                f"{path}.{key}: {value!r} contradicts the recipe, which sets it to {base[key]!r}; "
                "change the recipe or remove the key"
            )
        else:
            merged[key] = value
    return merged


def mark_for_norms(module: nn.Module, grid: Grid) -> None:
    """Make every element count exactly once in DeepSpeed's global gradient norm.

    DeepSpeed counts a parameter on a process if it is marked tensor-parallel or the process is the
    first of the model-parallel group. With pipeline parallelism this would leave out the replicated
    parameters of later stages (norms, biases), or count tied ones twice.
    """
    for parameter in module.parameters():
        split = info_of(parameter).partition_dim is not None
        counts = (split or grid.tensor_rank == 0) and not is_tied_copy(parameter)
        parameter.tensor_model_parallel = counts  # type: ignore[attr-defined]


def counts_in_norms(parameter: nn.Parameter) -> bool:
    """Whether norms count this process's elements of a parameter."""
    return bool(getattr(parameter, "tensor_model_parallel", True))


class ModelParallelUnit:
    """The grid with the interface of DeepSpeed's `mpu` (without a pipeline)."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def get_model_parallel_rank(self) -> int:
        """Rank within the tensor-parallel group."""
        return self._grid.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        """Size of the tensor-parallel group."""
        return self._grid.tensor

    def get_model_parallel_group(self) -> Any:
        """The tensor-parallel group."""
        return self._grid.tensor_group

    def get_data_parallel_rank(self) -> int:
        """Rank within the data-parallel group."""
        return self._grid.data_rank

    def get_data_parallel_world_size(self) -> int:
        """Size of the data-parallel group."""
        return self._grid.data

    def get_data_parallel_group(self) -> Any:
        """The data-parallel group."""
        return self._grid.data_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group


def adapt(engine: Any, grid: Grid) -> None:
    """Correct how DeepSpeed's optimizers handle norms and tied weights.

    Raises:
        RunError: if this version of DeepSpeed lacks a private part that is used here.
    """
    stage, pipeline = engine.zero_optimization_stage(), grid.pipeline > 1
    cases: list[Case] = ["pipeline"] if pipeline else []
    cases += ["offload"] if stage and engine.zero_cpu_offload() else []
    holders: dict[Holder, list[Any]] = {
        "engine": [engine],
        "optimizer": [engine.optimizer],
        "parameter": list(engine.module.parameters()),
        "pipeline": [engine.module],
    }
    check_private(stage, holders, cases)
    if stage == 0:
        record_plain_norm(engine, grid)
    elif stage < 3:
        norm_in_one_reduction(engine.optimizer, grid)
        if pipeline and engine.optimizer.use_grad_accum_attribute:
            sum_tied_gradients_in_float32(engine)


def record_plain_norm(engine: Any, grid: Grid) -> None:
    """Clip a plain fp32 optimizer's gradients by a norm in one reduction, and keep that norm."""

    def clip() -> None:
        total = torch.zeros((), dtype=torch.float64, device=grid.device)
        gradients = [
            parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None
        ]
        if grid.data_rank == 0:  # the others hold the same
            for parameter in engine.module.parameters():
                if parameter.grad is not None and counts_in_norms(parameter):
                    total += square_sum(parameter.grad)
        dist.all_reduce(total)
        norm = total.sqrt().float()
        engine._global_grad_norm = norm
        if engine.gradient_clipping():
            scale = (engine.gradient_clipping() / (norm + 1e-6)).clamp_max(1.0)
            torch._foreach_mul_(gradients, scale)

    take = engine.optimizer.step

    def step_if_finite(*arguments: Any, **options: Any) -> Any:
        """Skip the step if the gradient is not finite, as ZeRO does."""
        if not engine.gradient_clipping():  # the engine would not compute the norm otherwise
            clip()
        if math.isfinite(float(engine._global_grad_norm)):
            return take(*arguments, **options)
        return None

    engine.clip_fp32_gradients = clip
    engine.optimizer.step = step_if_finite


@contextlib.contextmanager
def one_optimizer_for_every_stage() -> Iterator[None]:
    """Give ZeRO 1 in bf16 with float32 sums the optimizer class of ZeRO 2.

    DeepSpeed would use `BF16_Optimizer` there, which keeps masters elsewhere and does not skip
    updates whose gradient is not finite.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION

    check_private(1, {"class": [DeepSpeedEngine]})
    choose = DeepSpeedEngine._do_optimizer_sanity_check

    def check(engine: Any, optimizer: Any) -> Any:
        chosen = choose(engine, optimizer)
        return ZERO_OPTIMIZATION if engine.zero_optimization() else chosen

    DeepSpeedEngine._do_optimizer_sanity_check = check
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = choose


@contextlib.contextmanager
def hooks_without_gathering(module: nn.Module) -> Iterator[None]:
    """Let DeepSpeed add ZeRO 3's gradient hooks without gathering the weights.

    A hook needs the shape of the whole parameter. DeepSpeed gathers every parameter in turn for
    that, so the start of a large model would send all weights to all processes. Here the parameter
    has its shape for this moment, and no memory.
    """
    divided = [one for one in module.parameters() if hasattr(one, "ds_shape")]
    check_private(3, {"parameter": divided})
    gathers = [parameter.all_gather for parameter in divided]  # type: ignore[attr-defined]
    for parameter, gather in zip(divided, gathers, strict=True):
        parameter.all_gather = partial(_show_shape, parameter, gather)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for parameter, gather in zip(divided, gathers, strict=True):
            parameter.all_gather = gather  # type: ignore[attr-defined]


def _show_shape(
    parameter: Any, gather: Callable[..., Any], several: Any = None, **options: Any
) -> Any:
    if several is not None:
        return gather(several, **options)
    parameter.data = parameter.data.new_empty(()).expand(parameter.ds_shape)
    parameter.ds_status = type(parameter.ds_status)["AVAILABLE"]
    return None


def sum_tied_gradients_in_float32(engine: Any) -> None:
    """Give the pipeline access to the gradients of tied weights where ZeRO 1 sums them.

    It would look for `.grad`, which is empty there, and each stage would keep its own half.
    """
    module = engine.module
    original = module.get_tied_weights_and_groups

    def tied() -> list[tuple[Any, Any]]:
        return [
            (weight if weight.grad_accum is None else _Gradient(weight.grad_accum), group)
            for weight, group in original()
        ]

    module.get_tied_weights_and_groups = tied


@dataclass(frozen=True)
class _Gradient:
    grad: torch.Tensor


def norm_in_one_reduction(zero: Any, grid: Grid) -> None:
    """Compute ZeRO 1/2's gradient norm with one reduction over all processes.

    DeepSpeed reduces once for every param group, also over the model-parallel processes. Pipeline
    stages hold different groups (the first has the embedding, the last the head), so the stage with
    more groups would wait for ever.
    """

    def gradients(index: int) -> Iterator[torch.Tensor]:
        """The elements of each parameter of a group that this process owns."""
        if not zero.cpu_offload:
            parts = zero.averaged_gradients[index]
            yield from (part for part in parts if not getattr(part, "_zero_padding", False))
            return
        flat = zero.single_partition_of_fp32_groups[index].grad
        for parameter in zero.params_in_partition[index]:
            _, _, start, count = zero.grad_position[zero.get_param_id(parameter)]
            yield flat.narrow(0, start, count)

    def scaled_global_norm(norm_type: int = 2) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=grid.device)
        for index, parameters in enumerate(zero.params_in_partition):
            for parameter, gradient in zip(parameters, gradients(index), strict=False):
                if counts_in_norms(parameter):
                    total += square_sum(gradient)
        dist.all_reduce(total)
        # In bf16, DeepSpeed skips an update whose norm is not finite only if it checks for
        # overflow; that check would read all gradients once more, although the norm shows the same.
        zero.check_grad_overflow = not bool(total.isfinite())
        # -1 is DeepSpeed's sign for a norm that is not finite.
        return torch.where(total.isfinite(), total.sqrt(), -1.0).float()

    zero.scaled_global_norm = scaled_global_norm


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keep what DeepSpeed prints, and its warnings, off the console."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def prepare_deepspeed() -> None:
    """Prepare for DeepSpeed's start: nothing is compiled at run time, and set-up is not logged."""
    for name in ("DeepSpeed", "deepspeed", "megatron"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ignore_old_names()
    with contextlib.suppress(ModuleNotFoundError):  # of another version: imported when needed
        import_light("deepspeed.runtime.zero.muon.original_muon")
    with silent():
        import deepspeed
    # On a CPU it would compile this operation, which only inference needs, on first use, and fail
    # without a compiler.
    check_private(0, {"package": [deepspeed.ops]})
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def pipeline_module(
    plans: list[LayerBlueprint], grid: Grid, loss: Callable[..., torch.Tensor] | None
) -> nn.Module:
    """This process's stage of a pipeline, with the loss of its last stage."""
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    # A pipeline module asks DeepSpeed for process ranks before an engine has connected it to torch.
    deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)

    def spec(plan: LayerBlueprint) -> Any:
        if plan.tied is None:
            return LayerSpec(plan.build, *plan.arguments)
        return TiedLayerSpec(
            plan.tied,
            plan.build,
            *plan.arguments,
            forward_fn=plan.forward,
            tied_weight_attr="weight",
        )

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its partition
        module = PipelineModule(
            layers=[spec(plan) for plan in plans],
            topology=PipeModelDataParallelTopology(
                num_pp=grid.pipeline, num_mp=grid.tensor, num_dp=grid.data
            ),
            loss_fn=loss,
            partition_method="type:block",
            activation_checkpoint_interval=0,
        )
    check_private(0, {"pipeline": [module]}, ["pipeline"])
    for tied in module.tied_comms.values():
        # DeepSpeed keeps one replica of a tied weight per stage; the others must not count in
        # norms.
        if grid.rank != min(tied["ranks"]):
            for parameter in tied["module"].parameters():
                parameter.ds_pipe_replicated = True
    stage: nn.Module = module
    return stage

"""The raw DeepSpeed keys that a recipe may set: tested keys that change only speed or memory.

DeepSpeed has about a hundred others. Some change results, some write files outside the run, and
some import any module that they name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pretrain.errors import UsageError

ALLOWED: dict[str, type] = {
    "zero_optimization.allgather_bucket_size": int,
    "zero_optimization.contiguous_gradients": bool,
    "zero_optimization.offload_optimizer.device": str,
    "zero_optimization.offload_optimizer.pin_memory": bool,
    "zero_optimization.overlap_comm": bool,
    "zero_optimization.reduce_bucket_size": int,
    "zero_optimization.reduce_scatter": bool,
    "zero_optimization.stage3_max_live_parameters": int,
    "zero_optimization.stage3_max_reuse_distance": int,
    "zero_optimization.stage3_param_persistence_threshold": int,
    "zero_optimization.stage3_prefetch_bucket_size": int,
    "zero_optimization.sub_group_size": int,
    "zero_optimization.use_multi_rank_bucket_allreduce": bool,
}
IMPLIED = frozenset((
    "bf16.enabled", "communication_data_type", "data_types.grad_accum_dtype",
    "gradient_accumulation_steps", "gradient_clipping", "pipeline.grad_partitioned",
    "pipeline.pipe_partitioned", "train_batch_size", "train_micro_batch_size_per_gpu",
    "zero_optimization.stage",
))  # fmt: skip
"""Keys that the recipe decides: a raw key may only have the same value."""
_MOST = {
    "zero_optimization.allgather_bucket_size": 10**10,  # allocated: 40 GB
    "zero_optimization.reduce_bucket_size": 10**10,
}
_MOST_ELSEWHERE = 10**15
_SECTIONS = {key.rpartition(".")[0] for key in (*ALLOWED, *IMPLIED)}
_DEVICES = ("cpu", "none")


def check_raw(raw: dict[str, Any]) -> None:
    """Refuse keys that are not known to work, before anything is built.

    Raises:
        UsageError: naming the first such key.
    """
    for key, value in _leaves(raw, ""):
        if key.split(".")[0] in ("optimizer", "scheduler", "fp16", "amp", "curriculum_learning"):
            raise UsageError(
                f"deepspeed.{key}: the recipe decides this (optimizer:, precision:); remove it"
            )
        if key == "bf16.bf16_master_weights_and_grads":
            raise UsageError(
                f"deepspeed.{key}: without fp32 master weights no weight decay takes effect "
                "(learning_rate x decay is below bf16's step); remove it"
            )
        if key in IMPLIED or (value == {} and key in _SECTIONS):
            continue
        if key not in ALLOWED:
            raise UsageError(
                f"deepspeed.{key}: is not one of the raw keys that are known to work; remove it, "
                f"or use one of {', '.join(ALLOWED)}"
            )
        kind = ALLOWED[key]
        if type(value) is not kind:
            raise UsageError(f"deepspeed.{key}: {value!r} is not {_WORDS[kind]}")
        if kind is str and value not in _DEVICES:
            raise UsageError(f"deepspeed.{key}: {value!r} is not {' or '.join(_DEVICES)}")
        if isinstance(value, int) and kind is int:
            _check_number(key, value)


def check_offload(raw: dict[str, Any], stage: int) -> None:
    """Refuse offload where DeepSpeed would ignore it.

    Raises:
        UsageError: without ZeRO.
    """
    offload = (raw.get("zero_optimization") or {}).get("offload_optimizer") or {}
    if stage == 0 and offload.get("device", "none") != "none":
        raise UsageError(
            "deepspeed.zero_optimization.offload_optimizer: has no effect with grid.zero_stage 0, "
            "which keeps the optimizer's state whole; use zero_stage 1, 2 or 3"
        )


def _check_number(key: str, value: int) -> None:
    """Refuse numbers that DeepSpeed asserts against, or that no memory holds."""
    least, most = int(key.endswith(".reduce_bucket_size")), _MOST.get(key, _MOST_ELSEWHERE)
    if not least <= value <= most:
        raise UsageError(f"deepspeed.{key}: is not from {least} to {most:,} elements")
    if key.endswith(".allgather_bucket_size") and value % 2:
        raise UsageError(f"deepspeed.{key}: {value} is odd; use an even number")


_WORDS = {int: "an integer", bool: "true or false", str: "a name"}


def _leaves(values: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value

"""The private parts of DeepSpeed that this package uses, which DeepSpeed may change.

It is one list: a version that renamed or removed something on it is refused at the start, with one
line that names it. `tests/engine/test_private_deepspeed.py` checks the list for every ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

from pretrain.errors import RunError

Holder = Literal["package", "class", "engine", "optimizer", "parameter", "pipeline", "gradient"]
"""The object that has an attribute: `deepspeed.ops`, the class DeepSpeedEngine, an engine, ZeRO's
optimizer, a parameter, a PipelineModule, a piece of ZeRO's gradients."""
Case = Literal["pipeline", "offload"]
"""Special cases: a grid with pipeline stages; ZeRO's optimizer on the CPU, with or without a
GPU."""
_EVERY = (0, 1, 2, 3)


@dataclass(frozen=True)
class Private:
    """One private attribute of DeepSpeed."""

    holder: Holder
    name: str
    """The name, with dots if it is inside another attribute."""
    why: str
    zero: tuple[int, ...] = _EVERY
    """ZeRO stages that use it."""
    only: Case | None = None
    """Used only in this case."""
    use: Literal["read", "set", "replaced"] = "read"
    """Whether a function of this package replaces it, which DeepSpeed then calls."""

    def __str__(self) -> str:
        return f"{self.holder}.{self.name}"


_MASTERS = "where the fp32 master weights are"
_NORM = "the gradient norm in one reduction"
_HOOKS = "gradient hooks without gathering the weights"
PRIVATE = (
    Private("package", "__compatible_ops__", "no operation is compiled at run time"),
    Private("class", "_do_optimizer_sanity_check", "one optimizer class for ZeRO 1 and 2",
            use="replaced"),
    Private("engine", "_global_grad_norm", "the gradient norm inside the step", (0,), use="set"),
    Private("engine", "clip_fp32_gradients", "a norm that counts each parameter once", (0,),
            use="replaced"),
    Private("optimizer", "_global_grad_norm", "the gradient norm inside the step", (1, 2, 3)),
    Private("optimizer", "optimizer", "the recipe's optimizer, inside ZeRO's", (1, 2, 3)),
    Private("optimizer", "single_partition_of_fp32_groups", _MASTERS, (1, 2)),
    Private("optimizer", "bit16_groups", _MASTERS, (1, 2)),
    Private("parameter", "_hp_mapping.lp_fragment_address.start", _MASTERS, (1, 2)),
    Private("parameter", "_hp_mapping.hp_fragment_address.start", _MASTERS, (1, 2)),
    Private("parameter", "_hp_mapping.hp_fragment", _MASTERS, (1, 2)),
    Private("optimizer", "averaged_gradients", _NORM, (1, 2)),
    Private("optimizer", "params_in_partition", _NORM, (1, 2)),
    Private("optimizer", "cpu_offload", _NORM, (1, 2)),
    Private("optimizer", "scaled_global_norm", _NORM, (1, 2), use="replaced"),
    Private("optimizer", "check_grad_overflow", "an update that is not finite changes nothing",
            (1, 2), use="set"),
    Private("gradient", "_zero_padding", _NORM, (1, 2)),
    Private("optimizer", "grad_position", _NORM, (1, 2), "offload"),
    Private("optimizer", "get_param_id", _NORM, (1, 2), "offload"),
    Private("optimizer", "update_lp_params", "working weights from masters", (1, 2)),
    Private("optimizer", "grad_position", _MASTERS, (3,)),
    Private("optimizer", "get_param_id", _MASTERS, (3,)),
    Private("optimizer", "fp32_partitioned_groups_flat", _MASTERS, (3,)),
    Private("optimizer", "fp16_groups", _MASTERS, (3,)),
    Private("optimizer", "sub_group_to_group_id", _MASTERS, (3,)),
    Private("parameter", "ds_numel", _MASTERS, (3,)),
    Private("parameter", "ds_shape", "the shape of a freed parameter", (3,)),
    Private("parameter", "ds_tensor", "the working copy of a parameter", (3,)),
    Private("parameter", "ds_process_group", _MASTERS, (3,)),
    Private("parameter", "convert_to_zero_parameters", "no process holds the model whole", (3,)),
    Private("parameter", "all_gather", _HOOKS, (3,), use="replaced"),
    Private("parameter", "ds_status", _HOOKS, (3,), use="set"),
    Private("parameter", "tensor_model_parallel", "each parameter counts once in norms",
            use="set"),
    Private("optimizer", "use_grad_accum_attribute", "tied weights' gradients", (1, 2), "pipeline"),
    Private("parameter", "grad_accum", "tied weights' gradients", (1, 2), "pipeline"),
    Private("pipeline", "get_tied_weights_and_groups", "tied weights' gradients", (1, 2),
            "pipeline", "replaced"),
    Private("pipeline", "tied_comms", "tied weights count once", only="pipeline"),
    Private("parameter", "ds_pipe_replicated", "tied weights count once", only="pipeline",
            use="set"),
)  # fmt: skip


def used(stage: int, cases: Iterable[Case] = ()) -> list[Private]:
    """The private parts that a ZeRO stage uses in the given cases."""
    return [
        part for part in PRIVATE if stage in part.zero and (not part.only or part.only in cases)
    ]


def check_private(
    stage: int, holders: Mapping[Holder, Sequence[Any]], cases: Iterable[Case] = ()
) -> None:
    """Refuse a version of DeepSpeed that lacks one of the used parts.

    Args:
        holders: the existing objects of each kind; other kinds are not checked.

    Raises:
        RunError: naming the first missing attribute, its purpose, and the versions that have it.
    """
    for part in used(stage, cases):
        if not all(_has(holder, part.name) for holder in holders.get(part.holder, ())):
            raise RunError(
                f"DeepSpeed {metadata.version('deepspeed')} has no {part} any more ({part.why}; "
                f"ZeRO {', '.join([str(stage), *cases])}): pip install '{_known_to_work()}'"
            )


def _has(holder: Any, dotted: str) -> bool:
    """Whether an attribute exists; attributes inside one that is None are not checked."""
    for name in dotted.split("."):
        if holder is None:
            return True
        if not hasattr(holder, name):
            return False
        holder = getattr(holder, name)
    return True


def _known_to_work() -> str:
    """This package's requirement, in the form for pip."""
    try:
        stated = metadata.requires("rankdecay") or []
    except metadata.PackageNotFoundError:
        stated = []
    return next(
        (requirement for requirement in stated if requirement.startswith("deepspeed")), "deepspeed"
    )

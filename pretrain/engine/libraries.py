"""The parts of Megatron-core that every run uses, loaded once; DeepSpeed's are loaded with it."""

from __future__ import annotations

import contextlib
import warnings

from data_pipeline.light_imports import import_light

_PARTS = (
    "megatron.core.tensor_parallel",
    "megatron.core.datasets.gpt_dataset",
)


def ignore_old_names() -> None:
    """Hide what torch 2.13 says about names that torch 2.11 has no others for."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def load_libraries() -> None:
    """Import them after the process has a device; parts that are missing here load when needed."""
    ignore_old_names()
    for part in _PARTS:
        with contextlib.suppress(ModuleNotFoundError):
            import_light(part)

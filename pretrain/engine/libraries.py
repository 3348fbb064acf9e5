"""The parts of Megatron-core that every run uses, loaded once; DeepSpeed's are loaded with it."""

from __future__ import annotations

import contextlib

from data_pipeline.light_imports import import_light

_PARTS = (
    "megatron.core.tensor_parallel",
    "megatron.core.datasets.gpt_dataset",
)


def load_libraries() -> None:
    """Import them after the process has a device; parts that are missing here load when needed."""
    for part in _PARTS:
        with contextlib.suppress(ModuleNotFoundError):
            import_light(part)

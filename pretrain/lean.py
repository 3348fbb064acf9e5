"""Megatron-core and DeepSpeed without what is never asked of them: seconds less at each start."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_PARTS = (
    "megatron.core.tensor_parallel",
    "megatron.core.datasets.gpt_dataset",
    "deepspeed.runtime.zero.muon.original_muon",
)


def load_libraries() -> None:
    """Import the parts that are used here, once, after the process has a device.

    Both decorate kernels of theirs with ``torch.compile`` while they are imported, which loads the
    whole compiler, and Megatron's inference engine looks for W&B; none of these is used here. For
    the time of the import the decorator does nothing, and W&B seems not to be installed.
    """
    if "megatron.core" in sys.modules:
        return
    for name in ("DeepSpeed", "deepspeed", "megatron"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with (
        _plain_compile(),
        _hidden("wandb"),
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        for part in _PARTS:
            with contextlib.suppress(ModuleNotFoundError):  # of another version: as it is, then
                importlib.import_module(part)


@contextmanager
def _plain_compile() -> Iterator[None]:
    import torch

    original = torch.compile

    def plain(model: Callable[..., Any] | None = None, **_: Any) -> Any:
        return model if model is not None else lambda function: function

    torch.compile = plain  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]

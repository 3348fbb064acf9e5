"""Imports Megatron-core and DeepSpeed without unused parts, which saves seconds at each start.

While they are imported, both decorate some of their kernels with ``torch.compile``, which loads the
whole compiler, and Megatron's inference engine looks for W&B. None of these is used here. During
the import, the decorator does nothing, and W&B appears not to be installed.
"""

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


def import_light(*names: str) -> list[Any]:
    """Import the named modules; the process must have chosen its device before.

    Raises:
        ModuleNotFoundError: if a module does not exist.
    """
    if all(name in sys.modules for name in names):
        return [sys.modules[name] for name in names]
    for name in ("DeepSpeed", "deepspeed", "megatron"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with (
        _plain_compile(),
        _hidden("wandb"),
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        return [importlib.import_module(name) for name in names]


@contextmanager
def _plain_compile() -> Iterator[None]:
    import torch

    original = torch.compile

    def plain(model: Callable[..., Any] | None = None, **_: Any) -> Any:
        return model if model is not None else lambda function: function

    torch.compile = plain
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

"""Decay by role and live ranks for any model in any loop, and the commands (docs/python.md).

The names here are stable: what is removed or changes its meaning is in the changelog first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pretrain.api.commands import LoadedRun, evaluate, load_run, ranks, train
from pretrain.api.groups import DecayGroups, decay_groups
from pretrain.api.probe import RankProbe
from pretrain.errors import RunError, UsageError
from pretrain.spectra import ProductStatistics, product_statistics

if TYPE_CHECKING:
    from pretrain.api.lightning import LightningRankCallback
    from pretrain.api.trainer import RankCallback

__all__ = [
    "DecayGroups",
    "LightningRankCallback",
    "LoadedRun",
    "ProductStatistics",
    "RankCallback",
    "RankProbe",
    "RunError",
    "UsageError",
    "decay_groups",
    "evaluate",
    "load_run",
    "product_statistics",
    "ranks",
    "train",
]

_CALLBACKS = {
    "RankCallback": "pretrain.api.trainer",
    "LightningRankCallback": "pretrain.api.lightning",
}
"""Names whose modules need a library that is not a dependency."""


def __getattr__(name: str) -> Any:
    if name not in _CALLBACKS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_CALLBACKS[name]), name)

"""Hashes that show whether two runs are comparable: initial weights, and samples and their order.

Runs of one seed that agree in both differ only in their recipe, and their results may be paired.
A fork begins with the weights of a checkpoint; it also records those of its trunk, with which it
may be paired.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from data_pipeline.files import read_json, write_aside
from data_pipeline.strict_json import to_json
from models.initial import initial_of
from models.roles import declared_parameters, info_of
from pretrain.config.recipe import Config
from pretrain.distributed.grid import Grid
from pretrain.tasks.task import Samples, Task

IDENTITY = "identity.json"


def data_order(config: Config, task: Task, data: Samples) -> str:
    """Hash of the data, of what determines its order, and of the samples of the first update."""
    first = hashlib.sha256()
    for number in range(min(config.train.global_batch, len(data))):
        first.update(data[number][0].tobytes())
    return _digest(
        [
            task.identity,
            data.shares,
            config.model.context,
            config.seed,
            config.train.global_batch,
            first.hexdigest(),
        ]
    )


def initial_weights(module: nn.Module, grid: Grid) -> str:
    """Hash of the names, shapes and initial values of a model; a collective call.

    It is the same on every process grid, because values depend on no grid.
    """
    mine = {info_of(p).name: initial_of(p).fingerprint for p in declared_parameters(module)}
    fingerprints: dict[str, str] = {}
    for part in grid.gather(mine):
        fingerprints |= part
    return _digest(sorted(fingerprints.items()))


def write_identity(
    run: Path, weights: str, order: str, task: Task, precision: str, trunks: Sequence[str] = ()
) -> None:
    """Write the hashes to the run folder, with those of the data and its tokenizer, and the
    precision of the run.

    Args:
        trunks: of a fork, the initial weights of its trunk, after those of the trunk's own trunks.
    """
    identity = {
        "initial_weights": weights,
        **({"trunks": list(trunks)} if trunks else {}),
        "data_order": order,
        "data": task.identity,
        "tokenizer": task.tokenizer,
        "precision": precision,
    }
    write_aside(run / IDENTITY, to_json(identity, indent=1).encode())


def read_identity(
    run: Path, keys: tuple[str, ...] = ("initial_weights", "data_order")
) -> dict[str, str] | None:
    """Hashes of a run, or None if one is missing or unreadable."""
    try:
        hashes = read_json(run / IDENTITY)
        return {key: str(hashes[key]) for key in keys}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_trunks(run: Path) -> list[str]:
    """The initial weights of a fork's trunks, the first trunk first; empty if not recorded."""
    try:
        trunks = read_json(run / IDENTITY).get("trunks", [])
        return [str(weights) for weights in trunks]
    except (OSError, ValueError, AttributeError, TypeError):
        return []


def line_of(run: Path, weights: str | None) -> list[str]:
    """Hashes of all weights from which a run descends, its own initial weights last.

    Args:
        weights: its initial weights; if the folder holds another run by now, they are all that is
            known.
    """
    identity = read_identity(run)
    known = identity is not None and identity["initial_weights"] == weights
    return [*(read_trunks(run) if known else []), *([weights] if weights else [])]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()

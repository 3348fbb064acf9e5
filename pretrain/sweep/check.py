"""Checks that the folders of a sweep hold runs of its file, with its recipes and trunks."""

from __future__ import annotations

import contextlib
import time

import torch

from pretrain.cli.console import Progress
from pretrain.config.recipe import Config
from pretrain.decay.lengths import check_lengths
from pretrain.engine.precision import with_precision
from pretrain.errors import RunError, UsageError
from pretrain.runs.folder import CONFIG, forked_from, known_recipe, recipe_of, resolve_checkpoint
from pretrain.sweep.config import Sweep, SweepRun
from pretrain.training.origin import StartRequest, begin
from pretrain.training.setup import prepare

_SILENT = 3.0
"""Seconds that a check may take without a word."""


def check_runs(sweep: Sweep, device: torch.device | None, silent: float = _SILENT) -> None:
    """Refuse a sweep whose folders hold runs of another recipe, before anything is written.

    Args:
        device: on which the runs train, which decides what precision auto means; None: not known.
        silent: seconds that it may take before its progress is shown.

    Raises:
        UsageError: naming the run, the key and both values.
    """
    began = time.monotonic()
    progress: Progress | None = None
    for number, task in enumerate(sweep.tasks):
        if time.monotonic() - began > silent:
            progress = progress or Progress(len(sweep.tasks), "check of the folders", True, number)
            progress.update(number)
        known = known_recipe(task.run)
        check_lengths(task.config, known)
        if (task.run / CONFIG).is_file():
            with contextlib.suppress(
                RunError
            ):  # damaged: the run's own start reports it, and what to do
                _check(task, device, known)
    if progress is not None:
        progress.close()


def _check(task: SweepRun, device: torch.device | None, known: Config | None) -> None:
    config = task.config
    if config.precision == "auto" and device is None:
        meant = recipe_of(task.run).precision
        config = config.model_copy(update={"precision": meant})
    elif device is not None:
        config = with_precision(config, device)
    fork = None
    if task.trunk is not None:
        before = forked_from(task.run)
        if before and before["step"] != task.trunk.last:
            raise UsageError(
                f"{task.run}: holds a run that was forked at step {before['step']}, but the sweep "
                f"has fork.step: {task.trunk.last}; choose another --out"
            )
        with contextlib.suppress(
            UsageError
        ):  # not trained that far: it starts from the trunk again
            fork = resolve_checkpoint(f"{task.trunk.run}@{task.trunk.last}")
    setup = prepare(config, config.grid.tensor_parallel, known)
    begin(setup, StartRequest(task.run, fork, task.until, task.config.precision))

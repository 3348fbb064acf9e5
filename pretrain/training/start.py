"""Starts a run: everything from its recipe to its first update."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.mirror import Mirror
from pretrain.checkpoint.reader import CHECKPOINTS, OWES_EVALUATION
from pretrain.checkpoint.recover import find_whole
from pretrain.checkpoint.saver import Saver
from pretrain.cli.console import plain, warn
from pretrain.config.recipe import Config
from pretrain.decay.lengths import say_remarks
from pretrain.distributed.grid import Grid
from pretrain.distributed.watchdog import Watchdog
from pretrain.engine.engine import Engine, build_engine, refuse_unfit
from pretrain.engine.micro_batch import (
    AUTO,
    MicroBatch,
    largest_micro_batch,
    memory_here,
    with_size,
)
from pretrain.engine.optimizers import refuse_missing_optimizer
from pretrain.engine.precision import resolve_precision, with_precision
from pretrain.engine.speed import speed_in_words
from pretrain.ranks.later import LateRanks
from pretrain.ranks.table import merge_ranks
from pretrain.ranks.writer import RankWriter
from pretrain.runs.finished import is_complete, put_evaluation_aside
from pretrain.runs.folder import create_run, known_recipe, misfit, rewind
from pretrain.runs.identity import data_order, initial_weights, write_identity
from pretrain.runs.lock import RunLock
from pretrain.runs.metrics import Tracker, refuse_missing_services
from pretrain.tasks.epochs import describe, in_words, unit_of, uses_of
from pretrain.training.faults import FaultDetector
from pretrain.training.loop import restore, run_training
from pretrain.training.origin import Origin, StartRequest, begin, described, with_jumps
from pretrain.training.setup import Setup, prepare
from pretrain.training.state import GENERATION, Moving, SampleSets, Training


def train(
    config: Config, run: Path, grid: Grid, fork: Path | None = None, until: int | None = None
) -> None:
    """Train ``config`` in the folder ``run``, from the beginning or from where it stopped.

    Args:
        fork: a checkpoint of another run to begin from: its weights, optimizer state and place
            in the data, with this recipe's decay.
        until: stop after this step, with a checkpoint, as a trunk that others fork from.

    Raises:
        UsageError, RunError: one line that names the cause; earlier checkpoints are untouched.
    """
    request = StartRequest(run, fork, until, config.precision)
    memory = memory_here(grid) if config.train.micro_batch == AUTO else 0.0
    with grid.together(""):
        # Refuse everything that can be refused before the folder is touched.
        prepared = prepare(with_precision(config, grid.device), grid.tensor, known_recipe(run))
        prepared, micro_batch = _with_micro_batch(prepared, grid, memory)
        setup, samples = _checked(prepared, request, grid)
    with _locked(run, grid):
        damaged = _find_whole(setup, run, grid)
        with grid.together(""):  # again: another process may have trained here until now
            setup, origin = begin(prepared, request)
            origin.trust()
        if _is_done(setup, origin, request, grid):
            return
        _write_folder(setup, origin, request, grid, micro_batch)
        engine, faults, weights = _built(setup, origin, grid)
        origin = _identified(setup, origin, run, grid, weights, samples)
        with Watchdog(grid, run, config.faults.watchdog) as watchdog:
            training = Training(
                engine=engine,
                setup=setup,
                run=run,
                tracker=_tracker(setup, origin, run, grid, damaged),
                table=RankWriter(run, setup.config.ranks),
                late=LateRanks(engine),
                saver=Saver(engine, run / CHECKPOINTS, config.checkpoint),
                watchdog=watchdog,
                faults=faults,
                samples=samples,
                until=until,
                initial_weights=weights,
                generation=origin.saved(GENERATION),
                moving=Moving(list(origin.jumps), _owes_evaluation(origin)),
            )
            run_training(training, origin)


def _owes_evaluation(origin: Origin) -> bool:
    """Whether the run's own start before this one owes an evaluation; a fork has its own steps."""
    return origin.own is not None and bool(origin.saved(OWES_EVALUATION))


def _with_micro_batch(
    prepared: Setup, grid: Grid, memory: float
) -> tuple[Setup, MicroBatch | None]:
    """The setup with ``train.micro_batch: auto`` replaced by a size for processes with some bytes
    of memory, and that size."""
    config = prepared.config
    if config.train.micro_batch != AUTO:
        return prepared, None
    found = largest_micro_batch(config, grid.device.type, grid.world_size, memory)
    return replace(prepared, config=with_size(config, found.size)), found


def _checked(prepared: Setup, request: StartRequest, grid: Grid) -> tuple[Setup, SampleSets]:
    """The setup for a start now, and its samples."""
    config = prepared.config
    if config.checkpoint.mirror:
        Mirror(config.checkpoint.mirror, request.run)
    setup, _ = begin(prepared, request)
    refuse_unfit(setup.config, grid)
    refuse_missing_optimizer(setup.config.optimizer)
    refuse_missing_services(setup.config.logging)
    held_out = setup.task.held_out(setup.config)
    data = setup.task.training(setup.config)
    return setup, SampleSets(data, held_out, data_order(setup.config, setup.task, data))


@contextmanager
def _locked(run: Path, grid: Grid) -> Iterator[None]:
    """Hold the run folder's lock: one job at a time."""
    lock = RunLock(run)
    try:
        with grid.together(""):
            if grid.is_main:
                lock.acquire()
        yield
    finally:
        lock.release()


def _find_whole(setup: Setup, run: Path, grid: Grid) -> list[str]:
    """Rename damaged checkpoints so that the newest one is complete, and return messages."""
    fits = partial(misfit, config=setup.config, task=setup.task)
    return find_whole(run / CHECKPOINTS, grid, setup.config.checkpoint.mirror, fits)


def _is_done(setup: Setup, origin: Origin, request: StartRequest, grid: Grid) -> bool:
    """Whether nothing is left to do; prints this."""
    own, run = origin.own, request.run
    done = own is not None and is_complete(run, setup.config, request.until)
    if not grid.broadcast(done):
        return False
    with grid.together(f"{run}"):
        if grid.is_main and own is not None:
            merge_ranks(run)  # the last merge may have failed
            text = f"{run}: is already at step {own.step}: nothing is left to do"
            print(text, file=sys.stderr, flush=True)
    return True


def _write_folder(
    setup: Setup,
    origin: Origin,
    request: StartRequest,
    grid: Grid,
    micro_batch: MicroBatch | None,
) -> None:
    """Print what runs, and bring the run folder to the step where the run begins."""
    run, config = request.run, setup.config
    with grid.together(f"{run}"):
        if not grid.is_main:
            return
        _announce(setup, request, grid)
        setting: dict[str, Any] = {
            "grid": grid.describe(),
            "precision": config.precision,
            "data": describe(setup.task, config),
        }
        if micro_batch is not None:
            print(f"{run}: {micro_batch.in_words()}", file=sys.stderr, flush=True)
            setting["micro_batch"] = asdict(micro_batch)
        if origin.kind == "forked" and request.fork is not None:
            setting["forked"] = described(request.fork)
        if run.is_dir():
            put_evaluation_aside(run, config, origin.step)
        create_run(run, config, setting)
        rewind(run, origin.own.step if origin.own else -1)


def _built(setup: Setup, origin: Origin, grid: Grid) -> tuple[Engine, FaultDetector, str]:
    """The engine and the fault detector in the origin's state, and the hash of the run's initial
    weights."""
    with grid.together(""):
        draws = origin.checkpoint is None
        torch.manual_seed(setup.config.seed)  # nothing here uses it; code of a user's own may
        engine = build_engine(setup.config, grid, setup.plan, setup.task.eod, draws)
    weights = origin.initial_weights(initial_weights(engine.module, grid))
    faults = FaultDetector(setup.config.faults)
    if origin.checkpoint is not None:
        with grid.together(""):
            restore(origin.checkpoint, engine, faults)
    return engine, faults, weights


def _identified(
    setup: Setup, origin: Origin, run: Path, grid: Grid, weights: str, samples: SampleSets
) -> Origin:
    """Write the hashes that decide what may be compared with this run; return the origin with
    jumps."""
    with grid.together(f"{run}"):
        if grid.is_main:  # only this process writes
            origin = with_jumps(origin, run)
            precision, trunks = setup.config.precision, origin.trunks(run)
            write_identity(run, weights, samples.order, setup.task, precision, trunks)
    return replace(origin, jumps=grid.broadcast(origin.jumps))


def _tracker(setup: Setup, origin: Origin, run: Path, grid: Grid, messages: list[str]) -> Tracker:
    """The log of the run, with earlier events."""
    tracker = Tracker(run, setup.config, grid.is_main, origin.step)
    for message in messages:
        tracker.log("event", origin.step, {"message": message})
    return tracker


def _announce(setup: Setup, request: StartRequest, grid: Grid) -> None:
    """Print one line about what runs, and a warning if less than possible is used."""
    run, config = request.run, setup.config
    count = sum(info.numel for info in setup.infos)
    stage, precision = config.grid.zero_stage, config.precision
    text = f"{run}: {count:,} parameters, {grid.describe()}, ZeRO {stage}, {precision}"
    print(text, file=sys.stderr, flush=True)
    for words in speed_in_words(config, grid):
        print(f"{run}: {words}", file=sys.stderr, flush=True)
    uses = uses_of(setup.task, config)
    if uses:
        words = in_words(uses, unit_of(config))
        print(f"{run}: {plain(words)}", file=sys.stderr, flush=True)
    say_remarks([config], known_recipe(run))
    if precision == "fp32" and resolve_precision(request.precision, grid.device, 1) == "bf16":
        warn("precision auto uses fp32 with grid.zero_stage 0; bf16 needs zero_stage 1 or more")

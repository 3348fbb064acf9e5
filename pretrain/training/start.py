"""A run from its recipe to its first update: what is checked, restored and begun."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pretrain.checkpoint.mirror import Mirror
from pretrain.checkpoint.reader import CHECKPOINTS, Checkpoint, step_of
from pretrain.checkpoint.recover import find_whole
from pretrain.checkpoint.saver import Saver
from pretrain.config.recipe import Config
from pretrain.console import plain, warn
from pretrain.decay.lengths import remarks
from pretrain.distributed.grid import Grid
from pretrain.distributed.watchdog import Watchdog
from pretrain.engine.deepspeed_adapter import resolve_precision
from pretrain.engine.engine import build_engine, micro_batches
from pretrain.errors import UsageError
from pretrain.runs.finished import check_finished, is_complete, put_evaluation_aside
from pretrain.runs.folder import (
    check_continues,
    create_run,
    forked_from,
    known_recipe,
    misfit,
    plan_for_resume,
    resume_point,
    rewind,
)
from pretrain.runs.identity import data_order, initial_weights, write_identity
from pretrain.runs.lock import RunLock
from pretrain.runs.metrics import Tracker
from pretrain.tasks.epochs import describe, in_words, unit_of, uses_of
from pretrain.training import between
from pretrain.training.faults import Judge, read_jumps, write_jumps
from pretrain.training.loop import restore, run_job
from pretrain.training.setup import Setup, prepare
from pretrain.training.state import GENERATION, Job


def train(
    config: Config, run: Path, grid: Grid, fork: Path | None = None, until: int | None = None
) -> None:
    """Train ``config`` in the folder ``run``, from the beginning or from where it stopped.

    Args:
        fork: a checkpoint of another run to begin from: its weights, optimizer state and place
            in the data, with this recipe's decay.
        until: stop after this step, with a checkpoint, as a trunk that others fork from.

    Raises:
        UsageError, RunError: one line that names the culprit; earlier checkpoints are untouched.
    """
    with grid.together(""):
        # Everything that can be refused is, before the folder is touched.
        asked = config.precision
        precision = resolve_precision(asked, grid.device, config.grid.zero_stage)
        # What auto means here is the run's from now on, wherever it goes on.
        config = config.model_copy(update={"precision": precision})
        prepared = prepare(config, grid.tensor, known_recipe(run))
        if config.checkpoint.mirror:
            Mirror(config.checkpoint.mirror, run)
        setup, _, _ = begin(prepared, run, fork, until, asked)
        micro_batches(setup.config, grid)
        sample = setup.task.held_out(setup.config)
        data = setup.task.training(setup.config)
        order = data_order(setup.config, setup.task, data)
    lock = RunLock(run)
    try:
        with grid.together(""):
            if grid.is_main:
                lock.acquire()
        # Again: another process may have trained here until now.
        fits = partial(misfit, config=setup.config, task=setup.task)
        damaged = find_whole(run / CHECKPOINTS, grid, config.checkpoint.mirror, fits)
        with grid.together(""):
            setup, checkpoint, start = begin(prepared, run, fork, until, asked)
            if checkpoint is not None:
                checkpoint.trust()
        if grid.broadcast(checkpoint is not None and is_complete(run, setup.config, until)):
            if grid.is_main and checkpoint is not None:
                print(
                    f"{run}: is at step {checkpoint.step} already: nothing is left to do",
                    file=sys.stderr,
                    flush=True,
                )
            return
        with grid.together(f"{run}"):
            if grid.is_main:
                _announce(setup, run, grid, asked)
                setting = {
                    "grid": grid.describe(),
                    "precision": precision,
                    "data": describe(setup.task, setup.config),
                }
                if fork is not None and checkpoint is None:
                    setting["forked"] = _described(fork)
                if start is not None and start.step == setup.config.train.steps:
                    put_evaluation_aside(run, setup.config)
                create_run(run, setup.config, setting)
                rewind(run, checkpoint.step if checkpoint else -1)
        with grid.together(""):
            engine = build_engine(setup.config, grid, setup.plan)
        weights = initial_weights(engine.module, grid)
        judge = Judge(config.faults)
        if start is not None:
            with grid.together(""):
                restore(start, engine, judge)
            # A fork begins with its trunk's weights.
            weights = start.state["initial_weights"] if checkpoint else start.digest
        jumped: list[int] = []
        with grid.together(f"{run}"):
            if grid.is_main:  # it alone writes
                jumped = _jumped(run, checkpoint, start)
        jumped = grid.broadcast(jumped)
        with grid.together(f"{run}"):
            if grid.is_main:
                write_identity(run, weights, order, setup.task, precision)
        first = start.step if start else 0
        tracker = Tracker(run, setup.config, grid.is_main, first)
        for message in damaged:
            tracker.log("event", first, {"message": message})
        saver = Saver(engine, run / CHECKPOINTS, config.checkpoint)
        with Watchdog(grid, run, config.faults.watchdog) as watchdog:
            job = Job(
                engine,
                setup,
                run,
                tracker,
                saver,
                watchdog,
                judge,
                data,
                sample,
                until,
                weights,
                jumped,
                start.state.get(GENERATION) if start else None,
            )
            if checkpoint is not None:
                job.owes_evaluation = checkpoint.state.get(between.OWES_EVALUATION, False)
            # An imported model is a run's own checkpoint, and nothing was measured yet.
            fresh = start is None or (checkpoint is not None and first == 0)
            run_job(job, first, fresh, forked=start is not None and not checkpoint)
    finally:
        lock.release()


def begin(
    setup: Setup, run: Path, fork: Path | None, until: int | None, asked: str
) -> tuple[Setup, Checkpoint | None, Checkpoint | None]:
    """The setup, the checkpoint of the run's own to go on from, and that or the fork's.

    Raises:
        UsageError: if the folder holds a run of another recipe or origin, or one that is finished
            and cannot do what is asked.
    """
    checkpoint = resume_point(run, setup.config, asked)
    if fork is not None:
        _check_origin(run, fork, checkpoint)
    if until is not None and until > setup.config.train.steps:
        raise UsageError(f"--until: {until} is after the last step, {setup.config.train.steps}")
    if checkpoint is not None and checkpoint.step >= (until or setup.config.train.steps):
        check_finished(run, setup.config, setup.plan, checkpoint, until)
    start = checkpoint or (Checkpoint(fork) if fork else None)
    if start is not None:
        policy = setup.config.resume.decay if checkpoint else "recipe"
        setup = _with_decay(setup, start, policy)
        if not checkpoint:
            _check_precision(start, setup.config.precision, asked)
        check_continues(start, setup.config, setup.task)
    return setup, checkpoint, start


def _described(fork: Path) -> dict[str, Any]:
    """What a run remembers of the checkpoint that it is forked from."""
    return {"run": str(fork.parent.parent), "step": step_of(fork)}


def _check_origin(run: Path, fork: Path, checkpoint: Checkpoint | None) -> None:
    """Refuse to take a run for one that was forked from another checkpoint than it was.

    Args:
        checkpoint: the newest of the run.
    """
    asked = "{run}@{step}".format(**_described(fork))
    mend = "leave --fork out to go on with that run, or choose another --out"
    if fork.resolve().parent == (run / CHECKPOINTS).resolve():
        raise UsageError(f"--fork: {asked} is of {run} itself, which --out names; {mend}")
    began = checkpoint.state.get("initial_weights") if checkpoint else None
    if checkpoint is not None and began and Checkpoint(fork).digest != began:
        before = forked_from(run)
        origin = "{run}@{step}".format(**before) if before else "other weights"
        raise UsageError(
            f"--fork: {run} is at step {checkpoint.step} of a run that began with {origin}, not "
            f"with {asked}; {mend}"
        )


def _check_precision(trunk: Checkpoint, precision: str, asked: str) -> None:
    """Refuse to fork into another precision that nobody asked for."""
    before = trunk.config.precision
    if asked == "auto" and before not in ("auto", precision):
        raise UsageError(
            f"precision: auto is {precision} here, {trunk.path} was trained in {before}; say "
            f"precision={before}, or precision={precision} if the change is meant"
        )


def _jumped(run: Path, checkpoint: Checkpoint | None, start: Checkpoint | None) -> list[int]:
    """Blocks of samples that are left out: the run's own, or of the trunk that it forks from."""
    if checkpoint is None and start is not None:
        found: list[int] = start.state.get("jumped", [])
        if found:
            write_jumps(run, found)
        return found
    saved: list[int] = checkpoint.state.get("jumped", []) if checkpoint else []
    return sorted({*saved, *read_jumps(run)})


def _with_decay(setup: Setup, start: Checkpoint, policy: str) -> Setup:
    """The setup with the decay that holds after a restore, by ``resume.decay``."""
    plan = plan_for_resume(setup.plan, start, setup.config, policy)
    if policy != "checkpoint":
        return replace(setup, plan=plan)
    optimizer = setup.config.optimizer.model_copy(
        update={"weight_decay": start.config.optimizer.weight_decay}
    )
    return replace(
        setup, plan=plan, config=setup.config.model_copy(update={"optimizer": optimizer})
    )


def _announce(setup: Setup, run: Path, grid: Grid, asked: str) -> None:
    """One line that says what runs, and a warning where less than possible does.

    Args:
        asked: the recipe's word for the precision.
    """
    count = sum(info.numel for info in setup.infos)
    stage, precision = setup.config.grid.zero_stage, setup.config.precision
    text = f"{run}: {count:,} parameters, {grid.describe()}, ZeRO {stage}, {precision}"
    print(text, file=sys.stderr, flush=True)
    uses = uses_of(setup.task, setup.config)
    if uses:
        words = in_words(uses, unit_of(setup.config))
        print(f"{run}: {plain(words)}", file=sys.stderr, flush=True)
    for remark in remarks(setup.config):
        warn(remark)
    if precision == "fp32" and resolve_precision(asked, grid.device, 1) == "bf16":
        warn("precision auto takes fp32 with grid.zero_stage 0; bf16 needs zero_stage 1 or more")

"""The training loop: one page that reads like the algorithm."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.roles import ParameterInfo
from pretrain.checkpoint import Checkpoint, load_into_engine, save_checkpoint
from pretrain.config import Config
from pretrain.control import DecayControl
from pretrain.decay import DecayPlan, plan_decay
from pretrain.deepspeed_adapter import resolve_precision
from pretrain.engine import Engine, build_engine, micro_batches, whole_model
from pretrain.errors import RunError, UsageError
from pretrain.grid import Grid
from pretrain.identity import data_order, initial_weights, write_identity
from pretrain.loader import Loader
from pretrain.lock import RunLock
from pretrain.probe import Row, measure, summary
from pretrain.run import (
    CHECKPOINTS,
    EVALUATION,
    add_ranks,
    check_continues,
    create_run,
    is_complete,
    merge_ranks,
    plan_for_resume,
    resume_point,
    rewind,
    write_text,
)
from pretrain.signals import StopRequestedError, StopSignals
from pretrain.tasks import Samples, Task, open_task
from pretrain.tracking import Progress, Tracker, warn


@dataclass(frozen=True)
class Setup:
    """A recipe made concrete: with its task's answers, its parameters and their λ."""

    config: Config
    task: Task
    infos: list[ParameterInfo]
    plan: DecayPlan


def prepare(config: Config, tensor_parallel: int) -> Setup:
    """Check a recipe against its data and plan the decay, without building anything.

    Raises:
        UsageError: if the data is missing or does not fit the model.
    """
    task = open_task(config)
    config = config.model_copy(update={"model": task.complete(config.model)})
    infos = whole_model(config.model, tensor_parallel)
    plan = plan_decay(infos, config.optimizer.weight_decay)
    DecayControl(config, plan)  # its policies, too, must fit the model
    return Setup(config, task, infos, plan)


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
        prepared = prepare(config, grid.tensor)
        setup, _, _ = _begin(prepared, run, grid, fork, until)
        data = setup.task.training(setup.config)
        sample = setup.task.held_out(setup.config)
        order = data_order(setup, data)
    lock = RunLock(run)
    try:
        with grid.together(""):
            if grid.is_main:
                lock.acquire()
        with grid.together(""):  # again: another process may have trained here until now
            setup, checkpoint, start = _begin(prepared, run, grid, fork, until)
        if grid.broadcast(checkpoint is not None and is_complete(run, setup.config, until)):
            return
        precision = resolve_precision(config.precision, grid.device, config.grid.zero_stage)
        with grid.together(f"{run}"):
            if grid.is_main:
                _announce(setup, run, grid, precision)
                create_run(run, setup.config, {"grid": grid.describe(), "precision": precision})
                rewind(run, start.step if start else -1)
        with grid.together(""):
            engine = build_engine(setup.config, grid, setup.plan)
            if start is not None:
                _restore(start, engine, setup.config)
        weights = initial_weights(engine.module, grid)
        if start is not None:  # a fork begins with its trunk's weights
            weights = start.state["initial_weights"] if checkpoint else start.digest
        with grid.together(f"{run}"):
            if grid.is_main:
                write_identity(run, weights, order, setup.task)
        tracker = Tracker(run, setup.config, grid.is_main)
        job = _Job(engine, setup, run, tracker, sample, until, weights)
        _train(job, data, start.step if start else 0, fresh=start is None, forked=not checkpoint)
    finally:
        lock.release()


def _begin(
    setup: Setup, run: Path, grid: Grid, fork: Path | None, until: int | None
) -> tuple[Setup, Checkpoint | None, Checkpoint | None]:
    """The setup, the checkpoint of the run's own to go on from, and that or the fork's."""
    checkpoint = resume_point(run, setup.config)
    start = checkpoint or (Checkpoint(fork) if fork else None)
    if start is not None:
        policy = setup.config.resume.decay if checkpoint else "recipe"
        setup = _with_decay(setup, start, policy)
        check_continues(start, setup.config, setup.task)
    if until is not None and until > setup.config.train.steps:
        raise UsageError(f"--until: {until} is after the last step, {setup.config.train.steps}")
    micro_batches(setup.config, grid)
    return setup, checkpoint, start


def _restore(start: Checkpoint, engine: Engine, config: Config) -> None:
    load_into_engine(start, engine)
    same = start.config.optimizer.weight_decay.policies == config.optimizer.weight_decay.policies
    engine.control.restore(start.state["decay"], same)
    engine.begin_step(start.step, 0.0)
    engine.audit_decay()


def _train(job: _Job, data: Samples, first: int, fresh: bool, forked: bool) -> None:
    """From step ``first`` to the end, with everything that must be closed."""
    config, grid = job.config, job.engine.grid
    micro, _ = micro_batches(config, grid)
    prefetch, workers = config.data.prefetch, config.task.workers
    loader = Loader(data, grid, config.train.global_batch, micro, first, prefetch, workers)
    try:
        if fresh:
            _measure_if_due(job, 0)
            _evaluate(job, 0)
        elif forked:
            _save(job, first)  # a fork stands on its own feet from here on
        with StopSignals() as signals:
            _loop(job, loader, first, signals)
    finally:
        loader.close()
        job.tracker.close()
        job.engine.close()


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


def _announce(setup: Setup, run: Path, grid: Grid, precision: str) -> None:
    """One line that says what runs, and a warning where less than possible does."""
    count = sum(info.numel for info in setup.infos)
    stage = setup.config.grid.zero_stage
    text = f"{run}: {count:,} parameters, {grid.describe()}, ZeRO {stage}, {precision}"
    print(text, file=sys.stderr, flush=True)
    if precision == "fp32" and resolve_precision(setup.config.precision, grid.device, 1) == "bf16":
        warn("precision auto takes fp32 with grid.zero_stage 0; bf16 needs zero_stage 1 or more")


@dataclass(frozen=True)
class _Job:
    engine: Engine
    setup: Setup
    run: Path
    tracker: Tracker
    sample: Any
    until: int | None
    initial_weights: str

    @property
    def last(self) -> int:
        """The step that training ends with, this time."""
        return self.until or self.config.train.steps

    @property
    def config(self) -> Config:
        return self.setup.config

    def is_due(self, section: str, step: int) -> bool:
        return step % self.config.interval(section) == 0 or step == self.last


def _loop(job: _Job, loader: Loader, first: int, signals: StopSignals) -> None:
    config, engine = job.config, job.engine
    steps, tokens_per_step = job.last, config.train.global_batch * config.model.context
    progress = Progress(steps, job.run.name, engine.grid.is_main, first)
    began, logged = time.monotonic(), first
    for step in range(first + 1, steps + 1):
        rate = config.learning_rate(step - 1)
        _refresh_exponents(job, step - 1)
        engine.begin_step(step - 1, rate)
        loss = engine.train_step(loader)
        if not math.isfinite(loss):
            raise RunError(
                f"step {step}: the loss is {loss}; lower optimizer.learning_rate or look at "
                f"samples {(step - 1) * config.train.global_batch}-"
                f"{step * config.train.global_batch - 1}"
            )
        if step % config.logging.every == 0 or step == steps:
            now = time.monotonic()
            speed = (step - logged) * tokens_per_step / (now - began)
            job.tracker.log(
                "train",
                step,
                {
                    "tokens": step * tokens_per_step,
                    "loss": loss,
                    "learning_rate": rate,
                    "grad_norm": engine.gradient_norm,
                    "tokens_per_second": speed,
                    "seconds": now - began,
                    "weight_decay": engine.control.in_use(),
                },
            )
            progress.update(step, f"loss {loss:.3f} {speed:,.0f} tokens/s")
            began, logged = now, step
        stopping = signals.agreed(engine.grid)
        saving = stopping or job.is_due("checkpoint", step)
        if saving:
            with engine.grid.together(f"step {step}"):
                engine.audit_decay()
        paused = time.monotonic()
        _measure_if_due(job, step)
        if job.is_due("evaluation", step):
            _evaluate(job, step)
        if saving:
            _save(job, step)
        if stopping and step < steps:
            progress.close()
            job.tracker.log("event", step, {"message": f"stopped by {signals.name}"})
            raise StopRequestedError(
                f"{job.run}: stopped by {signals.name} at step {step}, with a checkpoint; the same "
                "words go on"
            )
        began += time.monotonic() - paused  # the speed is of training alone
    progress.close()
    if job.last == config.train.steps:
        _finish(job)


def _measure_if_due(job: _Job, step: int) -> None:
    """Measure for the table, for rank targets, or once for both."""
    controllers = [one for one in job.engine.control.rank_controllers if step % one.every == 0]
    rows: list[Row] = []
    if job.is_due("ranks", step):
        rows = _measure(job, step)
    elif controllers:
        rows = measure(job.engine, step, 0, job.config.ranks)
    for controller in controllers:
        for message in controller.observe(rows, step):
            job.tracker.log("event", step, {"message": message})
            if job.engine.grid.is_main:
                warn(f"step {step}: {message}")


def _refresh_exponents(job: _Job, step: int) -> None:
    """New exponents for AlphaDecay, before the update number ``step``, where one is due."""
    for policy in job.engine.control.alpha:
        if step % policy.config.refresh == 0 or policy.exponents is None:
            figures = policy.observe(job.engine.shrinker.exponents(policy))
            job.tracker.log("alpha", step, {**figures, "exponents": policy.exponents})


def _measure(job: _Job, step: int) -> list[Row]:
    began = time.monotonic()
    tokens = step * job.config.train.global_batch * job.config.model.context
    rows = measure(job.engine, step, tokens, job.config.ranks)
    with job.engine.grid.together(f"{job.run}"):
        if job.engine.grid.is_main:
            add_ranks(job.run, step, rows)
            job.tracker.log("ranks", step, {**summary(rows), "seconds": time.monotonic() - began})
    return rows


def _evaluate(job: _Job, step: int) -> None:
    began = time.monotonic()
    figures = _figures(job, job.sample)
    keys = ("loss", "perplexity", "bits_per_byte", "accuracy")
    overall = {key: figures["overall"][key] for key in keys if key in figures["overall"]}
    overall["seconds"] = time.monotonic() - began
    job.tracker.log("evaluation", step, {"split": job.config.evaluation.split, **overall})


def _figures(job: _Job, chosen: Any, progress: Progress | None = None) -> dict[str, Any]:
    engine = job.engine
    report = (lambda done, total: progress.update(done, total=total)) if progress else None
    return job.setup.task.figures(engine.module, engine.grid, job.config, chosen, report)


def _save(job: _Job, step: int) -> None:
    state = {
        "samples": step * job.config.train.global_batch,
        "tokenizer": job.setup.task.tokenizer,
        "data": job.setup.task.identity,
        "decay": job.engine.control.state(),
        "initial_weights": job.initial_weights,
    }
    with job.engine.grid.together(f"{job.run}"):
        if job.engine.grid.is_main:
            merge_ranks(job.run)
    save_checkpoint(job.engine, job.run / CHECKPOINTS, step, state, keep=job.config.checkpoint.keep)


def _finish(job: _Job) -> None:
    """The final evaluation, once."""
    wanted = job.config.evaluation.at_end
    path = job.run / EVALUATION
    done = job.engine.grid.broadcast(path.exists())
    if wanted == "none" or done:
        return
    everything = wanted == "all"
    chosen = job.setup.task.held_out(job.config, everything=True) if everything else job.sample
    split = "test" if everything else job.config.evaluation.split
    progress = Progress(1, f"evaluate {split}", job.engine.grid.is_main)
    figures = _figures(job, chosen, progress)
    progress.close()
    if job.engine.grid.is_main:
        source = job.setup.task.source
        header = {"split": split, "step": job.config.train.steps, "data": source}
        write_text(path, json.dumps({**header, **figures}, indent=1))

"""The training loop: one page that reads like the algorithm, and what it does between updates."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.checkpoint import (
    Checkpoint,
    list_checkpoints,
    load_into_engine,
    newest_checkpoint,
    step_of,
)
from pretrain.config import Config
from pretrain.engine import Engine, micro_batches
from pretrain.errors import RunError
from pretrain.faults import GoBackError, Judge, block_of, write_jumps
from pretrain.grid import Grid
from pretrain.loader import Loader
from pretrain.probe import Row, measure, summary
from pretrain.recover import find_whole
from pretrain.replicas import are_replicated, disagreement
from pretrain.run import (
    CHECKPOINTS,
    EVALUATION,
    add_ranks,
    merge_ranks,
    rewind_ranks,
    write_text,
)
from pretrain.saver import HELD_OUT_LOSS, Saver
from pretrain.signals import StopRequestedError, StopSignals
from pretrain.tasks import Samples
from pretrain.tracking import Progress, Tracker, warn
from pretrain.watchdog import Watchdog

if TYPE_CHECKING:
    from pretrain.train import Setup


@dataclass
class Job:
    """A run under way, on this rank."""

    engine: Engine
    setup: Setup
    run: Path
    tracker: Tracker
    saver: Saver
    watchdog: Watchdog
    judge: Judge
    data: Samples
    """Training samples of a run without jumps."""
    sample: Any
    """Held-out samples for evaluation during training."""
    until: int | None
    initial_weights: str
    jumped: list[int]
    """Blocks of samples that are left out (`pretrain.faults.block_of`)."""
    went_back: int = 0
    """Times since the last checkpoint that was reached."""
    held_out_loss: tuple[int, float] = (-1, 0.0)
    """(step, loss) of the last evaluation."""
    unwritten: dict[int, list[Row]] = field(default_factory=dict)
    """Measurements that the disk did not take, by step."""

    @property
    def last(self) -> int:
        """The step that training ends with, this time."""
        return self.until or self.config.train.steps

    @property
    def config(self) -> Config:
        """The recipe."""
        return self.setup.config

    @property
    def grid(self) -> Grid:
        """The processes."""
        return self.engine.grid

    def is_due(self, section: str, step: int) -> bool:
        """Whether a section's interval ends at a step, or the run does."""
        return step % self.config.interval(section) == 0 or step == self.last

    def say(self, step: int, message: str, warning: bool = True) -> None:
        """An event: in the metrics, and on standard error."""
        self.tracker.log("event", step, {"message": message})
        if warning and self.grid.is_main:
            warn(f"step {step}: {message}")


def run_job(job: Job, first: int, fresh: bool, forked: bool) -> None:
    """From step ``first`` to the end, going back where faults ask for it."""
    try:
        if fresh:
            _measure_if_due(job, 0)
            _evaluate(job, 0)
        elif forked:
            _save(job, first)  # a fork stands on its own feet from here on
        with StopSignals() as signals:
            while True:
                loader = _loader(job, first)
                try:
                    _loop(job, loader, first, signals)
                    break
                except GoBackError as fault:
                    first = _go_back(job, fault)
                finally:
                    loader.close()
        job.saver.wait()
        _tell_saved(job)
        job.saver.finish()
    finally:
        job.saver.close()
        job.tracker.close()
        job.engine.close()


def _loader(job: Job, first: int) -> Loader:
    config = job.config
    micro, _ = micro_batches(config, job.grid)
    data = job.data
    if job.jumped:  # so many blocks more are wanted
        more = {"steps": config.train.steps + len(job.jumped)}
        longer = config.model_copy(update={"train": config.train.model_copy(update=more)})
        data = job.setup.task.training(longer)
    prefetch, workers = config.data.prefetch, config.task.workers
    batch = config.train.global_batch
    return Loader(data, job.grid, batch, micro, first, prefetch, workers, tuple(job.jumped))


def _loop(job: Job, loader: Loader, first: int, signals: StopSignals) -> None:
    config, engine = job.config, job.engine
    steps, tokens_per_step = job.last, config.train.global_batch * config.model.context
    progress = Progress(steps, job.run.name, engine.grid.is_main, first)
    began, logged = time.monotonic(), first
    for step in range(first + 1, steps + 1):
        rate = config.learning_rate(step - 1)
        _refresh_exponents(job, step - 1)
        engine.begin_step(step - 1, rate)
        loss = engine.train_step(loader)
        job.watchdog.beat(step)
        skipped = job.judge.observe(step, loss, engine.skipped)
        if skipped:
            job.say(step, skipped)
        elif step % config.logging.every == 0 or step == steps:
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
        _compare_if_due(job, step, saving)
        if saving:
            with engine.grid.together(f"step {step}"):
                engine.audit_decay()
        paused = time.monotonic()
        _measure_if_due(job, step)
        if job.is_due("evaluation", step):
            _evaluate(job, step)
        if saving:
            _save(job, step)
        _tell_saved(job)
        job.watchdog.beat(step)
        if stopping and step < steps:
            progress.close()
            job.say(step, f"stopped by {signals.name}", warning=False)
            job.saver.finish()
            raise StopRequestedError(
                f"{job.run}: stopped by {signals.name} at step {step}, with a checkpoint; the same "
                "words go on"
            )
        began += time.monotonic() - paused  # the speed is of training alone
    progress.close()
    if job.last == config.train.steps:
        _finish(job)


# --- faults ---------------------------------------------------------------------------------


def restore(start: Checkpoint, engine: Engine, judge: Judge) -> None:
    """Put an engine where a checkpoint is, with λ of its own plan."""
    load_into_engine(start, engine)
    policies = engine.config.optimizer.weight_decay.policies
    same = start.config.optimizer.weight_decay.policies == policies
    engine.control.restore(start.state["decay"], same)
    if "faults" in start.state:
        judge.restore(start.state["faults"])
    engine.begin_step(start.step, 0.0)
    engine.audit_decay()


def _go_back(job: Job, fault: GoBackError) -> int:
    """Restore the last checkpoint before a fault; returns its step."""
    job.saver.wait()
    folder = job.run / CHECKPOINTS
    with job.grid.together(f"{folder}"):
        if job.grid.is_main:
            for one in list_checkpoints(folder):
                if step_of(one) >= fault.step:  # of the time between the fault and its discovery
                    shutil.rmtree(one)
    find_whole(folder, job.grid, "")
    name = job.grid.broadcast(newest.name if (newest := newest_checkpoint(folder)) else "")
    samples = _samples(job, fault.jump)
    if not name or job.went_back >= job.config.faults.go_back_limit:
        why = "there is no checkpoint before it to go back to"
        if name:
            why = f"it happened again after going back {job.went_back} times"
        raise RunError(
            f"step {fault.step}: {fault}, and {why}; lower optimizer.learning_rate or look at "
            f"samples {samples}"
            if fault.jump
            else f"step {fault.step}: {fault}, and {why}; test the memory of that machine"
        )
    with job.grid.together(f"{folder / name}"):
        checkpoint = Checkpoint(folder / name)
        restore(checkpoint, job.engine, job.judge)
    message = f"step {fault.step}: {fault}; went back to step {checkpoint.step}"
    if fault.jump:
        blocks = [block_of(update - 1, job.jumped) for update in fault.jump]
        job.jumped = sorted({*job.jumped, *blocks})
        message += f" and past samples {samples}"
    job.went_back += 1
    with job.grid.together(f"{job.run}"):
        if job.grid.is_main:
            job.tracker.rewind(checkpoint.step)
            rewind_ranks(job.run, checkpoint.step)
            write_jumps(job.run, job.jumped)
    job.unwritten.clear()
    job.say(checkpoint.step, message)
    job.watchdog.beat(checkpoint.step)
    return checkpoint.step


def _samples(job: Job, updates: tuple[int, ...]) -> str:
    """``128-191, 256-319``: the samples that some updates took."""
    size = job.config.train.global_batch
    blocks = [block_of(update - 1, job.jumped) for update in updates]
    return ", ".join(f"{block * size}-{(block + 1) * size - 1}" for block in blocks)


def _compare_if_due(job: Job, step: int, saving: bool) -> None:
    """Compare replicated weights, before a checkpoint keeps what is wrong.

    Raises:
        GoBackError: if they differ.
    """
    every = job.config.faults.compare_every
    if not every or not are_replicated(job.grid, job.config.grid.zero_stage):
        return
    if saving or step % every == 0:
        found = disagreement(job.engine.module, job.grid)
        if found:
            raise GoBackError(step, f"{found}: a memory or a network is failing")


# --- between updates ------------------------------------------------------------------------


def _measure_if_due(job: Job, step: int) -> None:
    """Measure for the table, for rank targets, or once for both."""
    controllers = [one for one in job.engine.control.rank_controllers if step % one.every == 0]
    rows: list[Row] = []
    if job.is_due("ranks", step):
        rows = _measure(job, step)
    elif controllers:
        rows = measure(job.engine, step, 0, job.config.ranks)
    for controller in controllers:
        for message in controller.observe(rows, step):
            job.say(step, message)


def _refresh_exponents(job: Job, step: int) -> None:
    """New exponents for AlphaDecay, before the update number ``step``, where one is due."""
    for policy in job.engine.control.alpha:
        if step % policy.config.refresh == 0 or policy.exponents is None:
            figures = policy.observe(job.engine.shrinker.exponents(policy))
            job.tracker.log("alpha", step, {**figures, "exponents": policy.exponents})


def _measure(job: Job, step: int) -> list[Row]:
    began = time.monotonic()
    tokens = step * job.config.train.global_batch * job.config.model.context
    rows = measure(job.engine, step, tokens, job.config.ranks)
    if job.grid.is_main:
        job.unwritten[step] = rows
        _write_ranks(job, step)
        job.tracker.log("ranks", step, {**summary(rows), "seconds": time.monotonic() - began})
    job.watchdog.beat(step, "measuring ranks")
    return rows


def _write_ranks(job: Job, step: int) -> None:
    """Bring measurements to disk; what it refuses is kept for the next time."""
    try:
        for at in list(job.unwritten):
            add_ranks(job.run, at, job.unwritten[at])
            del job.unwritten[at]
    except OSError as error:
        job.say(step, f"rank statistics wait in memory: {error.strerror or error}")


def _evaluate(job: Job, step: int) -> None:
    began = time.monotonic()
    figures = _figures(job, job.sample, step)
    keys = ("loss", "perplexity", "bits_per_byte", "accuracy")
    overall = {key: figures["overall"][key] for key in keys if key in figures["overall"]}
    job.held_out_loss = (step, overall["loss"])
    overall["seconds"] = time.monotonic() - began
    job.tracker.log("evaluation", step, {"split": job.config.evaluation.split, **overall})


def _figures(
    job: Job, chosen: Any, step: int, show: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    def report(done: int, total: int) -> None:
        job.watchdog.beat(step, "evaluating")
        if show:
            show(done, total)

    module = job.engine.module
    return job.setup.task.figures(module, job.grid, job.config, chosen, report)


def _save(job: Job, step: int) -> None:
    state: dict[str, Any] = {
        "samples": step * job.config.train.global_batch,
        "tokenizer": job.setup.task.tokenizer,
        "data": job.setup.task.identity,
        "decay": job.engine.control.state(),
        "initial_weights": job.initial_weights,
        "faults": job.judge.state(),
        "jumped": job.jumped,
    }
    at, loss = job.held_out_loss
    if at == step:
        state[HELD_OUT_LOSS] = loss
    if job.grid.is_main:
        try:
            merge_ranks(job.run)
        except OSError as error:
            job.say(step, f"ranks.parquet waits: {error.strerror or error}")
    job.saver.save(step, state)
    if not job.judge.is_skipping:
        job.went_back = 0


def _tell_saved(job: Job) -> None:
    """Events of checkpoints that could not be written; the next is tried all the same."""
    while job.saver.outcomes:
        outcome = job.saver.outcomes.pop(0)
        if outcome.problem:
            more = "" if outcome.step == job.last else "; training goes on"
            job.say(outcome.step, outcome.problem + more)
        if outcome.note:
            job.say(outcome.step, outcome.note)


def _finish(job: Job) -> None:
    """The final evaluation, once."""
    wanted = job.config.evaluation.at_end
    path = job.run / EVALUATION
    done = job.grid.broadcast(path.exists())
    if wanted == "none" or done:
        return
    everything = wanted == "all"
    chosen = job.setup.task.held_out(job.config, everything=True) if everything else job.sample
    split = "test" if everything else job.config.evaluation.split
    progress = Progress(1, f"evaluate {split}", job.grid.is_main)
    figures = _figures(
        job, chosen, job.last, lambda done, total: progress.update(done, total=total)
    )
    progress.close()
    with job.grid.together(f"{path}"):
        if job.grid.is_main:
            source = job.setup.task.source
            header = {"split": split, "step": job.config.train.steps, "data": source}
            write_text(path, json.dumps({**header, **figures}, indent=1))

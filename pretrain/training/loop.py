"""The training loop: one page that reads like the algorithm, and how it goes back after faults."""

from __future__ import annotations

import time

from data_pipeline.disk import hide, remove
from pretrain.checkpoint.reader import (
    CHECKPOINTS,
    Checkpoint,
    list_checkpoints,
    load_into_engine,
    newest_checkpoint,
    step_of,
)
from pretrain.checkpoint.recover import find_whole
from pretrain.config.decay import same_policies
from pretrain.console import Progress
from pretrain.distributed.replicas import are_replicated, disagreement
from pretrain.distributed.signals import SIGNALS, StopRequestedError
from pretrain.engine.engine import Engine, micro_batches
from pretrain.errors import RunError
from pretrain.ranks.table import rewind_ranks
from pretrain.training import between
from pretrain.training.faults import GoBackError, Judge, block_of, write_jumps
from pretrain.training.loader import Loader
from pretrain.training.state import Job


def run_job(job: Job, first: int, fresh: bool, forked: bool) -> None:
    """From step ``first`` to the end, going back where faults ask for it."""
    try:
        if fresh:
            between.measure_if_due(job, 0)
            between.evaluate(job, 0)
        elif forked:
            if job.config.checkpoint.keep_best:
                between.evaluate(job, first)  # it may be the best
            between.save(job, first)  # a fork stands on its own feet from here on
        elif job.owes_evaluation:
            made = between.evaluate(job, first)
            if made and job.config.checkpoint.keep_best:
                between.save(job, first)  # now with its loss
        with SIGNALS.remembered():
            while True:
                loader = _loader(job, first)
                try:
                    _loop(job, loader, first)
                    break
                except GoBackError as fault:
                    first = _go_back(job, fault)
                finally:
                    loader.close()
            job.saver.wait()
            between.tell_saved(job)
            job.saver.finish()
    finally:
        job.saver.close()
        between.tell_saved(job)
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


def _loop(job: Job, loader: Loader, first: int) -> None:
    config, engine = job.config, job.engine
    steps, tokens_per_step = job.last, config.train.global_batch * config.model.context
    progress = Progress(steps, job.run.name, engine.grid.is_main, first)
    began, logged = time.monotonic(), first
    for step in range(first + 1, steps + 1):
        rate = config.learning_rate(step - 1)
        between.measure_weights(job, step - 1)
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
        stopping = SIGNALS.agreed(engine.grid)
        saving = stopping or job.is_due("checkpoint", step)
        _compare_if_due(job, step, saving)
        if saving:
            with engine.grid.together(f"step {step}"):
                engine.audit_decay()
            _compare_decay(job, step)
        paused = time.monotonic()
        between.measure_if_due(job, step)
        if job.is_due("evaluation", step) and not between.evaluate(job, step):
            stopping = saving = True  # the next start makes up for it
        if saving:
            job.saver.urgent = stopping or step == steps
            between.save(job, step)
        between.tell_saved(job)
        job.watchdog.beat(step)
        if stopping and (step < steps or job.owes_evaluation):
            progress.close()
            job.say(step, f"stopped by {SIGNALS.name}", warning=False)
            job.saver.finish()
            raise StopRequestedError(
                f"{job.run}: stopped by {SIGNALS.name} at step {step}, with a checkpoint; the same "
                "words go on"
            )
        began += time.monotonic() - paused  # the speed is of training alone
    progress.close()
    if job.last == config.train.steps:
        between.finish(job)


# --- faults ---------------------------------------------------------------------------------


def restore(start: Checkpoint, engine: Engine, judge: Judge) -> None:
    """Put an engine where a checkpoint is, with λ of its own plan."""
    load_into_engine(start, engine)
    before, now = (one.optimizer.weight_decay.policies for one in (start.config, engine.config))
    engine.control.restore(start.state["decay"], same_policies(before, now))
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
                    remove(hide(one))
    find_whole(folder, job.grid)
    newest = newest_checkpoint(folder)
    name = job.grid.broadcast(newest.name if newest else "")
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


def _compare_decay(job: Job, step: int) -> None:
    """Compare policies and λ over ranks: code of a user's own may depend on the rank.

    Raises:
        RunError: on every rank, if they differ.
    """
    found = job.grid.gather(job.engine.control.fingerprints())
    for rank, other in enumerate(found):
        for what, digest in other.items():
            if digest != found[0].get(what):
                raise RunError(
                    f"step {step}: {what} differs between ranks 0 and {rank}: a policy must depend "
                    "on its keys, the step and what it observes alone"
                )


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

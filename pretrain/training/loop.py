"""The training loop, written like the algorithm, and how it goes back after faults."""

from __future__ import annotations

from contextlib import closing

from data_pipeline.disk import hide, remove
from pretrain.checkpoint.reader import (
    CHECKPOINTS,
    Checkpoint,
    list_checkpoints,
    newest_checkpoint,
    step_of,
)
from pretrain.checkpoint.recover import find_whole
from pretrain.checkpoint.restore import load_into_engine
from pretrain.config.decay import same_policies
from pretrain.distributed.replicas import are_replicated, disagreement, drift
from pretrain.distributed.signals import SIGNALS, StopRequestedError
from pretrain.engine.engine import Engine, micro_batches
from pretrain.errors import ENDS, RunError
from pretrain.runs.follow import Follower
from pretrain.training import periodic
from pretrain.training.faults import FaultDetector, GoBackError, block_of, write_jumps
from pretrain.training.forensics import find_nonfinite
from pretrain.training.lines import UpdateLog
from pretrain.training.loader import Loader
from pretrain.training.origin import Origin
from pretrain.training.profiling import Profiler
from pretrain.training.state import Training


def run_training(training: Training, origin: Origin) -> None:
    """Train from the origin to the end, and go back after faults."""
    first = origin.step
    if training.grid.is_main:  # a resumed run shows its last measurement
        training.moving.ranks = Follower(training.run).look().ranks
    try:
        if origin.kind in ("new", "imported"):
            periodic.measure_if_due(training, 0)
            periodic.evaluate(training, 0)
        elif origin.kind == "forked":
            if training.config.checkpoint.keep_best:
                periodic.evaluate(training, first)  # it may be the best checkpoint
            periodic.save(training, first)  # a fork does not depend on its trunk from here on
        elif training.moving.owes_evaluation:
            periodic.evaluate_owed(training, first)
        profiler = Profiler(training.config.profile, training.run, training.grid)
        with SIGNALS.remembered(), closing(profiler):
            while True:
                loader = _loader(training, first)
                try:
                    _loop(training, loader, first, profiler)
                    break
                except GoBackError as fault:
                    profiler.close()  # what comes next is outside its window
                    first = _go_back(training, fault)
                finally:
                    loader.close()
            training.saver.wait()
            periodic.tell_saved(training)
            training.saver.finish()
    except ENDS as end:
        training.saver.close()  # its checkpoint counts, too
        newest = newest_checkpoint(training.run / CHECKPOINTS)
        end.add_note(
            f"rerun the same command to continue from step {step_of(newest)}"
            if newest
            else "rerun the same command to begin again (there is no checkpoint yet)"
        )
        raise
    finally:
        training.saver.close()
        periodic.tell_saved(training)
        training.tracker.close()
        training.engine.close()


def _loader(training: Training, first: int) -> Loader:
    config = training.config
    micro, _ = micro_batches(config, training.grid)
    data = training.samples.training
    if training.moving.jumped:  # this many more blocks are needed
        extended = {"steps": config.train.steps + len(training.moving.jumped)}
        longer = config.model_copy(update={"train": config.train.model_copy(update=extended)})
        data = training.setup.task.training(longer)
    prefetch, workers = config.data.prefetch, config.task.workers
    batch = config.train.global_batch
    return Loader(
        data, training.grid, batch, micro, first, prefetch, workers, tuple(training.moving.jumped)
    )


def _loop(training: Training, loader: Loader, first: int, profiler: Profiler) -> None:
    config, engine, steps = training.config, training.engine, training.last
    log = UpdateLog(training, first)
    for step in range(first + 1, steps + 1):
        rate = config.learning_rate(step - 1)
        periodic.measure_weights(training, step - 1)
        engine.begin_step(step - 1, rate)
        periodic.prepare_norms(training, step)
        with profiler.update(step):
            loss = engine.train_step(loader, more=step < steps)
        _tell_trace(training, step, profiler)
        training.watchdog.beat(step)
        where = find_nonfinite(training, step) if engine.skipped else ""
        skipped = training.faults.observe(step, loss, engine.skipped, where)
        if skipped:
            training.say(step, skipped)
        elif step % config.logging.every == 0 or step == steps:
            log.write(step, loss, rate)
        stopping, late = SIGNALS.agreed_with(engine.grid, training.has_not_saved_for_long())
        saving = stopping or late or training.is_due("checkpoint", step)
        _check(training, step, saving)
        with log.beside("statistics"):
            periodic.measure_norms(training, step)
            periodic.go_on_measuring(training, step)
            periodic.measure_if_due(training, step)
        log.show(step, loss)
        with log.beside("evaluation"):
            if training.is_due("evaluation", step) and not periodic.evaluate(training, step):
                stopping = saving = True  # the next start makes it
        with log.beside("saving"):
            if saving:
                training.saver.urgent = stopping or step == steps
                periodic.save(training, step)
            periodic.tell_saved(training)
        training.watchdog.beat(step)
        if stopping and (step < steps or training.moving.owes_evaluation):
            log.close()
            training.say(step, f"stopped by {SIGNALS.name}", warning=False)
            training.saver.finish()
            raise StopRequestedError(
                f"{training.run}: stopped by {SIGNALS.name} at step {step}, with a checkpoint; "
                "rerun the same command to continue"
            )
    log.close()
    if training.last == config.train.steps:
        periodic.finish(training)


def _tell_trace(training: Training, step: int, profiler: Profiler) -> None:
    """Write the trace if its last update was made; training continues without it."""
    try:
        trace = profiler.ended(step)
    except OSError as error:
        training.say(step, f"the trace could not be written: {error.filename}: {error.strerror}")
    else:
        if trace:
            training.say(step, f"trace written: {trace}", warning=False)


# --- faults ---------------------------------------------------------------------------------


def restore(start: Checkpoint, engine: Engine, faults: FaultDetector) -> None:
    """Restore an engine from a checkpoint, with λ of its own plan."""
    engine.forget_next_update()
    load_into_engine(start, engine)
    before, after = (
        config.optimizer.weight_decay.policies for config in (start.config, engine.config)
    )
    engine.control.restore(start.state["decay"], same_policies(before, after))
    if "faults" in start.state:
        faults.restore(start.state["faults"])
    engine.begin_step(start.step, 0.0)
    engine.audit_decay()


def _go_back(training: Training, fault: GoBackError) -> int:
    """Restore the last checkpoint before a fault, and return its step."""
    training.late.forget()
    training.saver.wait()
    folder = training.run / CHECKPOINTS
    with training.grid.together(f"{folder}"):
        if training.grid.is_main:
            for stored in list_checkpoints(folder):
                if step_of(stored) >= fault.step:  # written between the fault and its detection
                    remove(hide(stored))
    find_whole(folder, training.grid)
    newest = newest_checkpoint(folder)
    name = training.grid.broadcast(newest.name if newest else "")
    samples = _samples(training, fault.jump)
    if not name or training.moving.went_back >= training.config.faults.go_back_limit:
        why = "there is no checkpoint before it to go back to"
        if name:
            why = f"it happened again after going back {training.moving.went_back} times"
        raise RunError(
            f"step {fault.step}: {fault}, and {why}; lower optimizer.learning_rate or check "
            f"samples {samples}"
            if fault.jump
            else f"step {fault.step}: {fault}, and {why}; test the memory of that machine"
        )
    with training.grid.together(f"{folder / name}"):
        checkpoint = Checkpoint(folder / name)
        restore(checkpoint, training.engine, training.faults)
    message = f"step {fault.step}: {fault}; went back to step {checkpoint.step}"
    if fault.jump:
        blocks = [block_of(update - 1, training.moving.jumped) for update in fault.jump]
        training.moving.jumped = sorted({*training.moving.jumped, *blocks})
        message += f" and left out samples {samples}"
    training.moving.went_back += 1
    with training.grid.together(f"{training.run}"):
        if training.grid.is_main:
            training.tracker.rewind(checkpoint.step)
            training.table.rewind(checkpoint.step)
            write_jumps(training.run, training.moving.jumped)
    training.say(checkpoint.step, message)
    training.watchdog.beat(checkpoint.step)
    return checkpoint.step


def _samples(training: Training, updates: tuple[int, ...]) -> str:
    """``128-191, 256-319``: the samples that some updates used."""
    size = training.config.train.global_batch
    blocks = [block_of(update - 1, training.moving.jumped) for update in updates]
    return ", ".join(f"{block * size}-{(block + 1) * size - 1}" for block in blocks)


def _check(training: Training, step: int, saving: bool) -> None:
    """Compare replicated weights if it is due, and audit λ before a checkpoint."""
    _compare_if_due(training, step, saving)
    if saving:
        with training.grid.together(f"step {step}"):
            training.engine.audit_decay()
        _compare_decay(training, step)


def _compare_decay(training: Training, step: int) -> None:
    """Compare policies and λ over ranks: code of a user's own may depend on the rank.

    Raises:
        RunError: on every rank, if they differ.
    """
    by_rank = training.grid.gather(training.engine.control.fingerprints())
    for rank, fingerprints in enumerate(by_rank):
        for name, digest in fingerprints.items():
            if digest != by_rank[0].get(name):
                raise RunError(
                    f"step {step}: {name} differs between ranks 0 and {rank}: a policy must depend "
                    "on its keys, the step and what it observes alone"
                )


def _compare_if_due(training: Training, step: int, saving: bool) -> None:
    """Compare replicated weights, before a checkpoint would keep wrong ones.

    Raises:
        GoBackError: if copies of data-parallel processes differ.
    """
    every = training.config.faults.compare_every
    if not every or not (saving or step % every == 0):
        return
    grid, module, stage = training.grid, training.engine.module, training.config.grid.zero_stage
    if are_replicated(grid.data, stage):
        difference = disagreement(module, grid)
        if difference:
            raise GoBackError(step, f"{difference}: a memory or a network is failing")
    if are_replicated(grid.tensor, stage) and not training.moving.drifts:
        difference = drift(module, grid)
        if difference:
            training.moving.drifts = True
            training.say(
                step,
                f"{difference}, which tensor-parallel processes should hold alike: a memory fails, "
                "or a kernel is not deterministic; the run continues",
            )

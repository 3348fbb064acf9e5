"""What happens between updates: measurements, evaluation, checkpoints, the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from data_pipeline.files import held
from data_pipeline.strict_json import to_json
from pretrain.checkpoint.retention import HELD_OUT_LOSS
from pretrain.console import Progress
from pretrain.distributed.signals import SIGNALS, StopRequestedError
from pretrain.engine.deepspeed_adapter import resolve_precision
from pretrain.ranks.probe import Row, measure, summary
from pretrain.ranks.table import add_ranks, merge_ranks
from pretrain.runs.finished import is_evaluated, put_evaluation_aside
from pretrain.runs.folder import EVALUATION, write_text
from pretrain.training.state import GENERATION, Job

OWES_EVALUATION = "owes_evaluation"
"""Key of a checkpoint's state: its evaluation was cut short by a signal."""


def measure_if_due(job: Job, step: int) -> None:
    """Measure for the table, for policies that want ranks, or once for both."""
    policies = [one for one in job.engine.control.wanting("ranks") if one.due(step)]
    rows: list[Row] = []
    if job.is_due("ranks", step):
        rows = _measure(job, step)
    elif policies:
        rows = measure(job.engine, step, 0, job.config.ranks)
    for policy in policies:
        for message in policy.observe(rows, step):
            job.say(step, message)


def measure_weights(job: Job, step: int) -> None:
    """Figures of weights for policies that want them, before the update number ``step``."""
    for policy in job.engine.control.wanting("weights"):
        if not policy.due(step):
            continue
        for message in policy.observe(job.engine.shrinker.figures(policy), step):
            job.say(step, message)
        figures = policy.figures()
        if figures:
            job.tracker.log(policy.log_kind, step, figures)


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
            add_ranks(job.run, at, job.unwritten[at], job.config.ranks)
            del job.unwritten[at]
    except OSError as error:
        job.say(step, f"rank statistics wait in memory: {error.strerror or error}")


def evaluate(job: Job, step: int) -> bool:
    """Score the held-out sample; False if a signal, to any rank, cut it short."""
    began = time.monotonic()
    job.held_out_loss = (-1, 0.0)  # of this step, or of none: it may have gone back here
    try:
        figures = _figures(job, job.sample, step)
    except _CutShortError:
        job.owes_evaluation = True
        return False
    job.owes_evaluation = False
    keys = ("loss", "perplexity", "bits_per_byte", "accuracy")
    overall = {key: figures["overall"][key] for key in keys if key in figures["overall"]}
    job.held_out_loss = (step, overall["loss"])
    overall["seconds"] = time.monotonic() - began
    job.tracker.log("evaluation", step, {"split": job.config.evaluation.split, **overall})
    return True


class _CutShortError(Exception):
    """A signal came during an evaluation."""


def _figures(
    job: Job, chosen: Any, step: int, show: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    def report(done: int, total: int) -> None:
        job.watchdog.beat(step, "evaluating")
        if show:
            show(done, total)
        # Every rank passes here equally often.
        if done < total and SIGNALS.agreed(job.grid):
            raise _CutShortError

    module = job.engine.module
    return job.setup.task.figures(module, job.grid, job.config, chosen, report)


def save(job: Job, step: int) -> None:
    state: dict[str, Any] = {
        "samples": step * job.config.train.global_batch,
        "tokenizer": job.setup.task.tokenizer,
        "eod": job.setup.task.eod,
        "data": job.setup.task.identity,
        "decay": job.engine.control.state(),
        "initial_weights": job.initial_weights,
        "faults": job.judge.state(),
        "jumped": job.jumped,
    }
    if job.generation is not None:
        state[GENERATION] = job.generation
    at, loss = job.held_out_loss
    if at == step and math.isfinite(loss):
        state[HELD_OUT_LOSS] = loss
    if job.owes_evaluation:
        state[OWES_EVALUATION] = True
    job.saver.save(step, state, lambda: merge_ranks(job.run, always=step >= job.last))
    if not job.judge.is_skipping:
        job.went_back = 0


def tell_saved(job: Job) -> None:
    """Events of checkpoints that could not be written; the next is tried all the same."""
    while job.saver.outcomes:
        outcome = job.saver.outcomes.pop(0)
        if outcome.problem:
            more = "" if outcome.step == job.last else "; training goes on"
            job.say(outcome.step, outcome.problem + more)
        if outcome.note:
            job.say(outcome.step, outcome.note)


def finish(job: Job) -> None:
    """The final evaluation, once."""
    wanted = job.config.evaluation.at_end
    path = job.run / EVALUATION
    done = job.grid.broadcast(job.grid.is_main and is_evaluated(job.run, job.config))
    if wanted == "none" or done:
        return
    everything = wanted == "all"
    chosen = job.setup.task.held_out(job.config, everything=True) if everything else job.sample
    split = job.setup.task.split(job.config, everything)
    progress = Progress(1, f"evaluate {split}", job.grid.is_main)
    try:
        figures = _figures(
            job, chosen, job.last, lambda done, total: progress.update(done, total=total)
        )
    except _CutShortError:
        raise StopRequestedError(
            f"{job.run}: stopped by {SIGNALS.name} in its last evaluation, with a checkpoint; the "
            "same words go on"
        ) from None
    finally:
        progress.close()
    with job.grid.together(f"{path}"):
        if job.grid.is_main:
            source = job.setup.task.source
            config = job.config
            header = {
                "split": split,
                "sample": not everything,
                "step": config.train.steps,
                "data": source,
                "precision": resolve_precision(
                    config.precision, job.grid.device, config.grid.zero_stage
                ),
                "context": config.model.context,
            }
            with held(path, patience=60):
                # `pretrain evaluate` may have been quicker.
                if not is_evaluated(job.run, job.config):
                    put_evaluation_aside(job.run, job.config)
                    write_text(path, to_json({**header, **figures}, indent=1))

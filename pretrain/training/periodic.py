"""The work between updates: measurements, evaluation, checkpoints, and the end of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from data_pipeline.files import held
from data_pipeline.strict_json import to_json
from pretrain.checkpoint.reader import OWES_EVALUATION
from pretrain.checkpoint.retention import HELD_OUT_LOSS
from pretrain.cli.console import Progress
from pretrain.distributed.signals import SIGNALS, StopRequestedError
from pretrain.engine.layer_norms import as_figures
from pretrain.ranks.probe import Row, by_head, by_layer, measure, summary
from pretrain.ranks.table import merge_ranks
from pretrain.runs.finished import is_evaluated, put_evaluation_aside
from pretrain.runs.folder import EVALUATION, write_text
from pretrain.runs.metrics import read_metrics
from pretrain.training.state import GENERATION, Training


def measure_if_due(training: Training, step: int) -> None:
    """Measure for the table, for policies that want ranks, or once for both.

    Policies need the ranks now; for the table alone, a GPU's measurement is finished later.
    """
    policies = [
        candidate for candidate in training.engine.control.wanting("ranks") if candidate.due(step)
    ]
    due, rows = training.is_due("ranks", step), list[Row]()
    if due or policies:
        finish_measuring(training)
    began = time.monotonic()
    if due and not policies and training.late.can_begin():
        training.late.begin(step, _tokens(training, step), training.config.ranks)
        training.moving.measured_for = time.monotonic() - began
        return
    if due or policies:
        tokens = _tokens(training, step) if due else 0
        rows = measure(training.engine, step, tokens, training.config.ranks)
    if due:
        _write_ranks(training, step, rows, time.monotonic() - began)
    elif rows:
        training.moving.ranks = summary(rows)
    for policy in policies:
        for message in policy.observe(rows, step):
            training.say(step, message)


def go_on_measuring(training: Training, step: int) -> None:
    """Take the next step of a measurement that is not finished, after update ``step``."""
    began = time.monotonic()
    measured = training.late.go_on(step)
    training.moving.measured_for += time.monotonic() - began
    if measured is not None:
        _write_ranks(training, *measured, training.moving.measured_for)


def finish_measuring(training: Training) -> None:
    """Wait for a measurement that is not finished, and write it."""
    began = time.monotonic()
    measured = training.late.finish()
    if measured is not None:
        waited = training.moving.measured_for + time.monotonic() - began
        _write_ranks(training, *measured, waited)


def measure_weights(training: Training, step: int) -> None:
    """Figures of weights for policies that want them, before the update number ``step``."""
    for policy in training.engine.control.wanting("weights"):
        if not policy.due(step):
            continue
        for message in policy.observe(training.engine.shrinker.figures(policy), step):
            training.say(step, message)
        figures = policy.figures()
        if figures:
            training.tracker.log(policy.log_kind, step, figures)


def _measures_norms(training: Training, step: int) -> bool:
    every = training.config.norms_every
    return bool(every) and step % every == 0


def prepare_norms(training: Training, step: int) -> None:
    """Let the update number ``step`` be measured, if it is due."""
    if _measures_norms(training, step):
        training.engine.norms.arm()


def measure_norms(training: Training, step: int) -> None:
    """Log norms by layer and role of the update that was prepared, and the largest logits."""
    if not _measures_norms(training, step):
        return
    began = time.monotonic()
    norms = training.engine.norms.take()
    if norms is None or training.engine.skipped:
        return
    figures = as_figures(norms)
    if logits := training.engine.largest_logits():
        digits = max(2, len(str(max(logits))))
        figures["largest_logit"] = {
            f"layer_{layer:0{digits}}": value for layer, value in logits.items()
        }
    training.tracker.log("norms", step, {**figures, "seconds": time.monotonic() - began})


def _tokens(training: Training, step: int) -> int:
    return step * training.config.train.global_batch * training.config.model.context


def _write_ranks(training: Training, step: int, rows: list[Row], seconds: float) -> None:
    """Write a measurement to the table and its means to the log, on the main process.

    Args:
        rows: all rows; needed on the main process only.
        seconds: for which training waited.
    """
    if training.grid.is_main:
        training.moving.ranks = summary(rows)
        if reason := training.table.add(step, rows):
            training.say(step, f"{reason}; measurements wait in memory")
        means = {**training.moving.ranks, "rank_by_layer": by_layer(rows)}
        training.tracker.log("ranks", step, {**means, "seconds": seconds})
        maps = {f"rank_by_head/{name}": values for name, values in by_head(rows).items()}
        training.tracker.show(maps, step)
    training.watchdog.beat(step, "measuring ranks")


def _write_waiting(training: Training) -> str:
    """Write all that waits in memory for the disk, and return why it refuses some, or nothing."""
    refused = training.table.write_waiting()
    return training.tracker.write_waiting() or refused


def evaluate_owed(training: Training, step: int) -> None:
    """Make the evaluation that a signal cut short in the start before, and note it in a checkpoint.

    If the file has it, because the process ended before that checkpoint, only the loss is taken.
    """
    at_end = step >= training.last
    losses: list[float] = []
    with training.grid.together(f"{training.run}"):
        if training.grid.is_main:
            lines = read_metrics(training.run, "evaluation")
            losses = [line["loss"] for line in lines if line["step"] == step]
    losses = training.grid.broadcast(losses)
    if losses:
        training.moving.owes_evaluation = False
        training.moving.held_out_loss = (step, losses[-1])
    elif not evaluate(training, step):
        if at_end:
            raise _stopped_evaluating(training)
        return  # the next update ends with a checkpoint
    if training.config.checkpoint.keep_best or at_end:
        training.saver.urgent = at_end
        save(training, step)  # again: with its loss, and without the debt


def evaluate(training: Training, step: int) -> bool:
    """Score the held-out sample; return False if a signal to any process cut it short."""
    began = time.monotonic()
    training.moving.held_out_loss = (
        -1,
        0.0,
    )  # of this step, or none: the run may have gone back to here
    try:
        figures = _figures(training, training.samples.held_out, step)
    except _CutShortError:
        training.moving.owes_evaluation = True
        return False
    training.moving.owes_evaluation = False
    keys = ("loss", "perplexity", "bits_per_byte", "accuracy")
    overall = {key: figures["overall"][key] for key in keys if key in figures["overall"]}
    training.moving.held_out_loss = (step, overall["loss"])
    overall["seconds"] = time.monotonic() - began
    training.tracker.log("evaluation", step, {"split": training.config.evaluation.split, **overall})
    return True


class _CutShortError(Exception):
    """A signal came during an evaluation."""


def _stopped_evaluating(training: Training) -> StopRequestedError:
    """The end by a signal in the last evaluation, when the last checkpoint is there.

    Raises:
        RunError: if it could not be written.
    """
    training.saver.finish()
    return StopRequestedError(
        f"{training.run}: stopped by {SIGNALS.name} in its last evaluation, with a checkpoint; "
        "rerun the same command to continue"
    )


def _figures(
    training: Training, chosen: Any, step: int, show: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    def report(done: int, total: int) -> None:
        training.watchdog.beat(step, "evaluating")
        if show:
            show(done, total)
        # Every process passes here equally often.
        if done < total and SIGNALS.agreed(training.grid):
            raise _CutShortError

    module = training.engine.module
    return training.setup.task.figures(module, training.grid, training.config, chosen, report)


def save(training: Training, step: int) -> None:
    """Save a checkpoint, after what was measured before it."""
    finish_measuring(training)
    training.moving.saved_at = time.monotonic()
    state: dict[str, Any] = {
        "samples": step * training.config.train.global_batch,
        "tokenizer": training.setup.task.tokenizer,
        "eod": training.setup.task.eod,
        "data": training.setup.task.identity,
        "decay": training.engine.control.state(),
        "initial_weights": training.initial_weights,
        "faults": training.faults.state(),
        "jumped": training.moving.jumped,
    }
    if training.generation is not None:
        state[GENERATION] = training.generation
    evaluated_step, loss = training.moving.held_out_loss
    if evaluated_step == step and math.isfinite(loss):
        state[HELD_OUT_LOSS] = loss
    if training.moving.owes_evaluation:
        state[OWES_EVALUATION] = True
    refused = _write_waiting(training)
    training.saver.save(
        step,
        state,
        lambda: merge_ranks(training.run, always=step >= training.last),
        # What waits in memory goes with the process; the updates before it can be made again.
        refused if training.saver.urgent else "",
    )
    if not training.faults.is_skipping:
        training.moving.went_back = 0


def tell_saved(training: Training) -> None:
    """Report checkpoints that could not be written; the next one is still tried."""
    while training.saver.outcomes:
        outcome = training.saver.outcomes.pop(0)
        if outcome.problem:
            ending = "" if outcome.step == training.last else "; training continues"
            training.say(outcome.step, outcome.problem + ending)
        if outcome.note:
            training.say(outcome.step, outcome.note)


def finish(training: Training) -> None:
    """Make the final evaluation, once."""
    wanted = training.config.evaluation.at_end
    path = training.run / EVALUATION
    done = training.grid.broadcast(
        training.grid.is_main and is_evaluated(training.run, training.config)
    )
    if wanted == "none" or done:
        return
    everything = wanted == "all"
    chosen = (
        training.setup.task.held_out(training.config, everything=True)
        if everything
        else training.samples.held_out
    )
    split = training.setup.task.split(training.config, everything)
    progress = Progress(1, f"evaluate {split}", training.grid.is_main)
    try:
        figures = _figures(
            training, chosen, training.last, lambda done, total: progress.update(done, total=total)
        )
    except _CutShortError:
        raise _stopped_evaluating(training) from None
    finally:
        progress.close()
    training.saver.wait()
    if training.saver.refused:  # the next start makes these weights again
        return
    with training.grid.together(f"{path}"):
        if training.grid.is_main:
            source = training.setup.task.source
            config = training.config
            header = {
                "split": split,
                "sample": not everything,
                "step": config.train.steps,
                "data": source,
                "precision": config.precision,
                "context": config.model.context,
            }
            with held(path, patience=60):
                # `pretrain evaluate` may have been faster.
                if not is_evaluated(training.run, training.config):
                    put_evaluation_aside(training.run, config, training.last)
                    write_text(path, to_json({**header, **figures}, indent=1))

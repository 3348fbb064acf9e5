"""`pretrain sweep --dry-run`: lists runs and tokens, and estimates time and cost by a short
timing."""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.reader import CHECKPOINTS, newest_checkpoint, step_of
from pretrain.cli.console import show_table
from pretrain.config.recipe import dump_config
from pretrain.engine.micro_batch import memory_of_device
from pretrain.errors import RunError
from pretrain.runs.lock import is_busy
from pretrain.runs.metrics import METRICS, read_metrics
from pretrain.sweep.at_once import runs_per_gpu
from pretrain.sweep.config import Sweep, SweepRun
from pretrain.sweep.run import code_words, is_done

_STEPS = 8
"""Number of steps of the timing; the first two are not counted."""

_PARTLY = ("running", "stopped")
"""States of runs that have made some of their updates."""

Starter = Callable[[list[str]], "subprocess.CompletedProcess[str]"]
"""A function that runs `pretrain WORDS...` like one run of the sweep."""


def plan(
    sweep: Sweep, slots: int, start: Starter | None, price: float, on_gpus: bool = False
) -> dict[str, Any]:
    """The dry run as plain data.

    Args:
        slots: runs at once.
        start: how to start the short timing; None: no timing.
        price: price of one process for one hour, in any currency.
        on_gpus: the runs would share the GPUs of this machine.
    """
    open_tasks = [task for task in sweep.tasks if not is_done(task)]
    estimate: dict[str, Any] = {
        "runs": [_describe(task) for task in sweep.tasks],
        "tokens": sum(_steps_left(task) * task.tokens // task.steps for task in open_tasks),
        "open": len(open_tasks),
        "exposure": sorted(sweep.config.exposure),
    }
    if start is None or not open_tasks:
        return estimate
    speed = _timing(open_tasks[-1], start)
    seconds = [_seconds(task, speed) for task in open_tasks]
    hours = sum(seconds) / 3600
    if on_gpus and len(open_tasks) > 1:
        configs = [task.config for task in open_tasks]
        memory = memory_of_device(torch.device("cuda")) / 2**30
        count, why = runs_per_gpu(configs, sweep.config.processes, speed["peak_memory_gib"], memory)
        estimate["per_gpu"] = {"runs": count, "why": why}
    return {
        **estimate,
        "timing": speed,
        "seconds_a_run": statistics.mean(seconds),
        "seconds": max(sum(seconds) / slots, *seconds),
        "process_hours": hours * sweep.config.processes,
        "cost": hours * sweep.config.processes * price,
    }


def _describe(task: SweepRun) -> dict[str, Any]:
    return {
        "name": task.name,
        "run": str(task.run),
        "values": task.point.values if task.point else {},
        "seed": task.config.seed,
        "steps": task.steps,
        "tokens": task.tokens,
        "state": _state(task),
        "step": _saved(task),
    }


def _state(task: SweepRun) -> str:
    """``done``, ``running``, ``stopped`` or ``waiting``, as `pretrain watch` says."""
    if is_done(task):
        return "done"
    if is_busy(task.run):
        return "running"
    return "stopped" if (task.run / METRICS).exists() else "waiting"


def _saved(task: SweepRun) -> int:
    """The step of the newest checkpoint, from which a run continues; 0 without one."""
    checkpoint = newest_checkpoint(task.run / CHECKPOINTS)
    return step_of(checkpoint) if checkpoint else 0


def _steps_left(task: SweepRun) -> int:
    """Updates that a run has yet to make; without its trunk's."""
    return min(task.steps, max(0, task.last - _saved(task)))


def _timing(task: SweepRun, start: Starter) -> dict[str, float]:
    """Seconds of a step, a measurement, an evaluation and a start, from a few steps."""
    with tempfile.TemporaryDirectory(prefix="timing-") as folder:
        recipe, run = Path(folder) / "recipe.yaml", Path(folder) / "run"
        steps = min(_STEPS, task.config.train.steps)
        logging = task.config.logging.model_copy(update={"wandb": "", "every": 1})
        recipe.write_text(dump_config(task.config.model_copy(update={"logging": logging})))
        began = time.monotonic()
        words = ["train", str(recipe), "--out", str(run), "--until", str(steps)]
        done = start([*words, *code_words(task)])
        wall = time.monotonic() - began
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RunError(f"timing failed: {last.removeprefix('error: ')}")
        tokens = task.config.train.global_batch * task.config.model.context
        rows = read_metrics(run)
        steps_taken = [tokens / row["tokens_per_second"] for row in rows]
        parts = {
            kind: statistics.mean(row["seconds"] for row in read_metrics(run, kind))
            for kind in ("ranks", "evaluation")
        }
    step = statistics.median(steps_taken[2:] or steps_taken)
    inside = step * steps + 2 * sum(parts.values())
    return {
        "step": step,
        "measurement": parts["ranks"],
        "evaluation": parts["evaluation"],
        "start": max(0.0, wall - inside),
        "peak_memory_gib": rows[-1]["device"]["peak_memory_gib"],
    }


def _seconds(task: SweepRun, speed: dict[str, float]) -> float:
    config, steps = task.config, _steps_left(task)
    return (
        speed["start"]
        + steps * speed["step"]
        + steps / config.interval("ranks") * speed["measurement"]
        + steps / config.interval("evaluation") * speed["evaluation"]
    )


def print_plan(estimate: dict[str, Any], slots: int) -> None:
    """Print the dry run as a table to standard output."""
    from rich.table import Table

    table = Table(title=f"{len(estimate['runs'])} runs, {estimate['open']} to do")
    for column in ("run", "values", "steps", "tokens", "state"):
        table.add_column(column, justify="right" if column in ("steps", "tokens") else "left")
    for run in estimate["runs"]:
        values = ", ".join(f"{key.rpartition('.')[2]} {v}" for key, v in run["values"].items())
        tokens = f"{run['tokens']:,}"
        state = run["state"] + f" at step {run['step']}" * (run["state"] in _PARTLY)
        table.add_row(run["name"], values, f"{run['steps']:,}", tokens, state)
    show_table(table, 120)
    if estimate["exposure"]:
        keys = ", ".join(key.rpartition(".")[2] for key in estimate["exposure"])
        print(f"{keys}: the name of a run and its folder has the exposure, `values` has λ")
    print(f"{estimate['tokens']:,} tokens to train")
    if "timing" in estimate:
        minutes = estimate["seconds"] / 60
        together = f"{slots} at once" + ", if they do not slow each other" * (slots > 1)
        print(
            f"timed: {estimate['timing']['step'] * 1000:.0f} ms per step, "
            f"{estimate['seconds_a_run']:.0f} s per run (without its last evaluation); {together}: "
            f"about {minutes:.0f} min, {estimate['process_hours']:.2f} process-hours, cost "
            f"{estimate['cost']:.2f}"
        )
    if "per_gpu" in estimate:
        print(f"runs at once per GPU: {estimate['per_gpu']['runs']}, {estimate['per_gpu']['why']}")

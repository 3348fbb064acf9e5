"""The run folder, which every tool reads and which makes a killed run resumable.

``RUN/config.yaml metrics.jsonl ranks.parquet checkpoints/ evaluation.json environment.json``
"""

from __future__ import annotations

import contextlib
import math
import re
from operator import attrgetter
from pathlib import Path
from typing import Any

from data_pipeline.disk import hide, remove, remove_hidden
from data_pipeline.files import is_leftover, write_aside
from data_pipeline.strict_json import to_json
from pretrain.checkpoint.manifest import DamagedError
from pretrain.checkpoint.reader import (
    CHECKPOINTS,
    LATEST,
    RUN_ID,
    Checkpoint,
    fork_words,
    list_checkpoints,
    names_in,
    new_run_id,
    newest_checkpoint,
    run_id_of,
    step_of,
)
from pretrain.checkpoint.retention import why_missing
from pretrain.config.compare import as_written, differences
from pretrain.config.recipe import Config, dump_config, load_config
from pretrain.decay.plan import DecayDifference, DecayPlan, compare, plan_from
from pretrain.decay.registry import POLICIES
from pretrain.errors import RunError, UsageError
from pretrain.ranks.table import RANKS, check_definition, rewind_ranks
from pretrain.ranks.table import read_ranks as read_ranks  # noqa: PLC0414 - tools read it from here
from pretrain.runs.code import changed_code, keep_code, kept_code
from pretrain.runs.environment import environment
from pretrain.runs.lock import LOCK
from pretrain.runs.metrics import METRICS, rewind_metrics
from pretrain.runs.records import Evaluation, Start, read_record
from pretrain.runs.unfit import why_no_checkpoint
from pretrain.tasks.task import Task

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
EVALUATION = "evaluation.json"
LAUNCHED = ("launch", "logs")
"""Folders of `pretrain launch` in a run folder."""
FREE = ("data.path", "data.prefetch", "task.workers", "train.micro_batch")
"""Keys inside the science sections that change no number (or are checked by content)."""
_SAMPLE = ("evaluation.split", "evaluation.documents")
"""Keys of the held-out sample, which must stay the same for all losses of a run."""
_SHOWN = 3
"""Number of other keys that a refusal names."""
_KEPT = ("seed.", "model.", "task.", "data.", "train.global_batch.")
"""Keys that a fork keeps too (`check_continues`)."""
_OWN = (CONFIG, RUN_ID, RANKS, METRICS, ENVIRONMENT)
"""Files that only training writes under a temporary name: leftovers of a kill are deleted."""
_WRITING = re.compile(r"\.step-[0-9]{8,18}\.writing")
_DYNAMIC = ("policies", "form", "coupling", "adadecay_slope", "nuclear_every")
"""Keys of ``optimizer.weight_decay`` that change λ during a run."""


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it."""
    write_aside(path, text.encode("utf-8"))


def create_run(run: Path, config: Config, setting: dict[str, Any]) -> None:
    """Make the folder and record what runs in it, where and with which versions.

    Args:
        setting: values that the machine (grid, precision) and the data determine.
    """
    run.mkdir(parents=True, exist_ok=True)
    if (run / METRICS).is_symlink():
        raise RunError(
            f"{run / METRICS}: is a link, and nothing is written through links; remove it"
        )
    write_text(run / CONFIG, dump_config(config))  # first: it makes the folder a run
    keep_code(run, config)
    _clear_leftovers(run)
    if not run_id_of(run):
        write_text(run / RUN_ID, _id_of_checkpoints(run) or new_run_id())
    starts = [*read_starts(run), {**environment(), **setting}]
    write_text(run / ENVIRONMENT, to_json(starts, indent=1))


def read_starts(run: Path) -> list[dict[str, Any]]:
    """Machine, versions and setting of each start of a run; empty if they are not recorded.

    Raises:
        RunError: if the file is damaged.
    """
    try:
        starts: list[dict[str, Any]] = read_record(run / ENVIRONMENT, list[Start])
        return starts
    except FileNotFoundError:
        return []


def was_imported(run: Path) -> bool:
    """Whether a run started from an imported model, according to its records."""
    return any("imported" in start for start in _starts(run))


def forked_from(run: Path) -> dict[str, Any] | None:
    """The run folder and the step from which a run was forked, according to its records."""
    origins = [start["forked"] for start in _starts(run) if "forked" in start]
    return origins[-1] if origins else None


def _starts(run: Path) -> list[dict[str, Any]]:
    """The record of starts; empty if there is none or it is damaged."""
    try:
        return read_starts(run)
    except RunError:
        return []


def read_evaluation(path: Path) -> dict[str, Any]:
    """Read an ``evaluation.json``; null, which means not finite, becomes NaN again.

    Raises:
        FileNotFoundError: if there is none.
        RunError: if it is damaged.
    """
    evaluation: dict[str, Any] = read_record(path, Evaluation)
    for part in (
        evaluation["overall"],
        *evaluation.get("subsets", {}).values(),
        evaluation.get("pile_weighted"),
    ):
        for key in ("loss", "perplexity", "bits_per_byte"):
            if part and part.get(key, 0) is None:
                part[key] = math.nan
    return evaluation


def _id_of_checkpoints(run: Path) -> str:
    """The id in the newest checkpoint."""
    newest = newest_checkpoint(run / CHECKPOINTS)
    return Checkpoint(newest).run if newest else ""


def _clear_leftovers(run: Path) -> None:
    """Delete leftovers of a killed write; the folder is locked."""
    (run / CHECKPOINTS).mkdir(exist_ok=True)
    for name in names_in(run / CHECKPOINTS):
        if _WRITING.fullmatch(name):
            remove(hide(run / CHECKPOINTS / name))
        elif is_leftover(name, LATEST):
            (run / CHECKPOINTS / name).unlink()
    remove_hidden(run / CHECKPOINTS)
    for name in names_in(run):
        if is_leftover(name, *_OWN):
            (run / name).unlink()


def recipe_of(run: Path) -> Config:
    """The recipe of a run folder, with the precision with which the run began.

    Earlier versions kept the value auto there, and its meaning in the record of starts.
    """
    config = load_config(run / CONFIG)
    if config.precision != "auto":
        return config
    starts = read_starts(run)
    words = [start["precision"] for start in starts if start.get("precision") in ("fp32", "bf16")]
    return config.model_copy(update={"precision": words[0]}) if words else config


def known_recipe(run: Path) -> Config | None:
    """The recipe of a run, or None if there is no run or its recipe cannot be read."""
    if not (run / CONFIG).is_file():
        return None
    try:
        return recipe_of(run)
    except (RunError, UsageError):  # code that needs it reports the error
        return None


def _changes(old: Config, new: Config) -> dict[str, Any]:
    """The `differences` that matter; the meaning of auto in an old checkpoint may be unknown."""
    return {
        key: values
        for key, values in differences(old, new).items()
        if key not in FREE and (key, values[0]) != ("precision", "auto")
    }


def resume_point(run: Path, config: Config, recipe_precision: str = "") -> Checkpoint | None:
    """The checkpoint from which a run in this folder continues, or None for a new run.

    Args:
        recipe_precision: precision in the recipe; ``config`` has its meaning on this machine.

    Raises:
        UsageError: if the folder holds a run with another recipe.
    """
    if not (run / CONFIG).exists():
        # Leftovers of a kill, the folder for the mirror's checkpoint, and files of a launcher.
        expected = {f"{CONFIG}.tmp", LOCK, CHECKPOINTS, RUN_ID, *LAUNCHED, ".launch.lock"}
        unknown = {name for name in names_in(run) if not is_leftover(name, *_OWN)} - expected
        if unknown:
            raise UsageError(f"{run}: not empty and not a run folder; choose another --out")
        return _newest_readable(run)
    old = recipe_of(run)
    every = _changes(old, config)
    changed = {
        key: values for key, values in every.items() if not key.startswith("optimizer.weight_decay")
    }
    sample = differences(old, config, ("evaluation",))
    changed |= {key: sample[key] for key in _SAMPLE if key in sample}
    if changed:
        key, (before, after) = next(iter(changed.items()))
        if key == "precision" and recipe_precision not in ("", after):
            after = f"{recipe_precision}, which is {after} here"
        names = [name for name in every | changed if name != key]
        more = " and more" * (len(names) > _SHOWN)
        others = f" (different too: {', '.join(names[:_SHOWN])}{more})" if names else ""
        newest, fork = _newest_readable(run), ""
        if newest and not any(f"{name}.".startswith(_KEPT) for name in changed):
            fork = f", or continue from it with {fork_words(run, newest.step, config.train.steps)}"
        raise UsageError(
            f"{run}: holds a run with {key}={as_written(before)}, the recipe says "
            f"{as_written(after)}{others}; choose another --out{fork}"
        )
    check_definition(run, config.ranks)
    return _newest_readable(run)


def misfit(checkpoint: Checkpoint, config: Config, task: Task) -> str:
    """Why a checkpoint does not fit this recipe and its data; empty if it does."""
    for key, (before, after) in _changes(checkpoint.config, config).items():
        return f"{key} {as_written(before)}, here {as_written(after)}"
    if (checkpoint.state["tokenizer"], checkpoint.state["data"]) != (task.tokenizer, task.identity):
        return "other data"
    if checkpoint.state.get("eod", task.eod) != task.eod:
        return "other data (another token ends documents)"
    return ""


def _newest_readable(run: Path) -> Checkpoint | None:
    for path in reversed(list_checkpoints(run / CHECKPOINTS)):
        with contextlib.suppress(DamagedError):  # `find_whole` reports it after the run is locked
            return Checkpoint(path)
    return None


def resolve_checkpoint(text: str) -> Path:
    """A checkpoint folder from ``RUN``, ``RUN@STEP`` or the folder itself.

    Raises:
        UsageError: naming what was not found and which steps there are.
    """
    name, _, wanted = text.rpartition("@") if "@" in text else (text, "", "")
    path = Path(name)
    if (path / "manifest.json").is_file() and not wanted:
        # The run is found from parent folders, which a path such as "." does not contain.
        return path.resolve() if len(path.parts) < 3 or ".." in path.parts else path
    checkpoints = list_checkpoints(path / CHECKPOINTS)
    if not checkpoints:
        raise UsageError(f"{name}: {why_no_checkpoint(path)}")
    if not wanted or wanted == "last":
        return checkpoints[-1]
    steps = {step_of(checkpoint): checkpoint for checkpoint in checkpoints}
    if not wanted.isdigit() or int(wanted) not in steps:
        there = ", ".join(map(str, steps))
        raise UsageError(
            f"{text}: no such step; the run has {there}{_why_not(path, wanted, max(steps))}"
        )
    return steps[int(wanted)]


def _why_not(run: Path, wanted: str, newest: int) -> str:
    """Why a run has no checkpoint of a step, if its recipe says so."""
    with contextlib.suppress(UsageError, RunError):
        config = load_config(run / CONFIG)
        if wanted.isdigit() and 0 < int(wanted) < newest:
            return why_missing(int(wanted), config.interval("checkpoint"), config.checkpoint.keep)
    return ""


def plan_for_resume(
    plan: DecayPlan, checkpoint: Checkpoint, config: Config, policy: str
) -> DecayPlan:
    """The plan that holds after a restore, by ``resume.decay``.

    Raises:
        UsageError: with ``error``, if λ, or what changes λ, differs; the message has the table.
    """
    infos = [info for group in plan.groups for info in group.parameters]
    if policy == "recipe":
        return plan
    if policy == "checkpoint":
        for section in checkpoint.config.optimizer.weight_decay.policies:
            if missing := POLICIES.absent(section):
                raise UsageError(f"resume.decay: the checkpoint's {missing}")
        return plan_from(infos, checkpoint.decays)
    changed = decay_changes(plan, checkpoint, config)
    if not changed:
        return plan
    words = "resume.decay=recipe or resume.decay=checkpoint"
    if changed_code(checkpoint.config, config):
        old_code = " ".join(kept_code(checkpoint.path.parent.parent, checkpoint.config))
        words = (
            "resume.decay=recipe (the new file, which begins without the memory of the old) or "
            f"resume.decay=checkpoint {old_code}"
        )
    raise UsageError(
        f"{checkpoint.path}: was trained with another weight decay: {changed}; choose one "
        f"with {words} (or --fork to a new run)"
    )


def decay_changes(plan: DecayPlan, checkpoint: Checkpoint, config: Config) -> str:
    """How λ of a checkpoint, or what changes λ, differs from a plan; empty if it does not."""
    infos = [info for group in plan.groups for info in group.parameters]
    changed = _table(compare(infos, checkpoint.decays, plan.by_name))
    if changed:
        return changed
    if code := changed_code(checkpoint.config, config):
        return "; ".join(code)
    moved = differences(checkpoint.config, config, ("optimizer",))
    return ", ".join(
        f"{key} {as_written(before)} -> {as_written(after)}"
        for key, (before, after) in moved.items()
        if key.rpartition(".")[2] in _DYNAMIC or ".form." in key or ".coupling." in key
    )


def _table(changed: list[DecayDifference]) -> str:
    def where(difference: DecayDifference) -> str:
        return (
            f"{difference.role} (layers {difference.layers})"
            if difference.layers
            else difference.role.value
        )

    return ", ".join(
        f"{where(difference)} {difference.before:g} -> {difference.after:g}"
        for difference in changed
    )


def check_continues(checkpoint: Checkpoint, config: Config, task: Task) -> None:
    """Refuse to continue with another model or other samples than the checkpoint's.

    Raises:
        UsageError: naming what differs.
    """
    if checkpoint.step > config.train.steps:
        raise UsageError(
            f"train.steps: {config.train.steps} is before {checkpoint.path}; set train.steps above "
            f"{checkpoint.step}"
        )
    if checkpoint.config.model != config.model:
        old, new = (c.model.model_dump() for c in (checkpoint.config, config))
        key = next(key for key in old if old[key] != new[key])
        raise UsageError(
            f"{checkpoint.path}: has a model with {key}={old[key]}, but the recipe and its data "
            f"give {new[key]}; use the recipe and the data that the checkpoint was trained with"
        )
    for key in ("seed", "data.weights", "train.global_batch"):
        before, after = (attrgetter(key)(recipe) for recipe in (checkpoint.config, config))
        if before != after:
            raise UsageError(
                f"{key}: {after} is not the {before} of {checkpoint.path}, so its order of samples "
                "cannot be continued; use the same value"
            )
    if checkpoint.state["tokenizer"] != task.tokenizer:
        raise UsageError(
            f"{task.source}: was tokenised with another tokenizer than {checkpoint.path}; "
            "use that run's data"
        )
    if checkpoint.state.get("eod", task.eod) != task.eod:
        raise UsageError(
            f"{task.source}: its documents end with token {task.eod}, but those of "
            f"{checkpoint.path} end with {checkpoint.state['eod']}; use that run's data"
        )
    if checkpoint.state["data"] != task.identity:
        raise UsageError(
            f"{task.source}: has other tokens than {checkpoint.path} was trained on; use that "
            "run's data (otherwise its order of samples cannot be continued)"
        )


def rewind(run: Path, step: int) -> None:
    """Remove what was logged and measured after ``step``."""
    rewind_metrics(run, step)
    rewind_ranks(run, step)

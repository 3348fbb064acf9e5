"""Decides whether a run is finished, and refuses changes that a finished run cannot follow any
more.

After the last update, another interval, policy or rule for keeping checkpoints would change
nothing, but the folder would claim that it had applied. An evaluation is different: it can still be
made.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_pipeline.files import read_json, read_small
from pretrain.checkpoint.reader import (
    CHECKPOINTS,
    OWES_EVALUATION,
    Checkpoint,
    fork_words,
    list_checkpoints,
    step_of,
)
from pretrain.cli.console import warn
from pretrain.config.compare import as_written, differences
from pretrain.config.recipe import Config
from pretrain.decay.plan import DecayPlan
from pretrain.errors import RunError, UsageError
from pretrain.runs.folder import CONFIG, EVALUATION, decay_changes, recipe_of
from pretrain.runs.records import Evaluation, check_record

FREE = (
    "checkpoint.asynchronous",
    "checkpoint.mirror",
    "deepspeed",
    "evaluation.at_end",  # can still be made
    "evaluation.batch",
    "faults.watchdog",
    "grid",
    "logging",
    "profile",
    "resume",
    "speed",
)
"""Keys and sections that may have any value when a finished run is started again: how it computes,
what it reports to services, and the evaluation at its end. `resume_point` compares the keys that
change results (`SCIENCE`), and λ is compared for every tensor."""
_LATE = ("checkpoint", "evaluation", "ranks", "faults")
"""Sections that may change during a run, and have no effect after its end."""


def is_trained(run: Path, config: Config, until: int | None = None) -> bool:
    """Whether a run has a checkpoint of its last step (or ``until``), or of a later one."""
    checkpoints = list_checkpoints(run / CHECKPOINTS)
    return bool(checkpoints) and step_of(checkpoints[-1]) >= (until or config.train.steps)


def is_complete(run: Path, config: Config, until: int | None = None) -> bool:
    """Whether the run is trained to its last step (or ``until``) and evaluated as the recipe
    asks, also after its last update."""
    if not is_trained(run, config, until) or _owes_evaluation(run):
        return False
    return until is not None or config.evaluation.at_end == "none" or is_evaluated(run, config)


def _owes_evaluation(run: Path) -> bool:
    """Whether a signal cut the evaluation of the newest checkpoint's step short."""
    newest = list_checkpoints(run / CHECKPOINTS)[-1]
    try:
        return _is_owed(newest, (newest / "manifest.json").stat().st_mtime_ns)
    except (OSError, RunError):  # damaged: the next start reports it
        return False


@lru_cache(maxsize=256)
def _is_owed(checkpoint: Path, _: int) -> bool:
    """Read one state of a manifest once: a sweep and `watch` ask again and again."""
    return bool(Checkpoint(checkpoint).state.get(OWES_EVALUATION))


def is_evaluated(run: Path, config: Config) -> bool:
    """Whether ``evaluation.json`` has the last step's figures that `evaluation.at_end` asks for."""
    path = run / EVALUATION
    try:
        figures = _figures(path)
        if _step_of(figures, config) != config.train.steps:
            return False
        return _is_sample(run, figures) == (config.evaluation.at_end == "sample")
    except ValueError:  # damaged: it is made again
        return False
    except (OSError, RunError):
        return path.exists()  # not readable: the code that reads it reports this


def put_evaluation_aside(run: Path, config: Config, step: int) -> None:
    """Rename an ``evaluation.json`` that has other figures than those of this run at its end.

    Args:
        step: updates made so far. Figures of a later step are of weights that are trained again,
            perhaps with another decay. After the last step, they must be what the recipe asks for.
    """
    path, at_end = run / EVALUATION, step >= config.train.steps
    if not path.exists() or (at_end and is_evaluated(run, config)):
        return
    try:
        figures = _figures(path)
    except ValueError:
        if at_end:
            _put_damaged_aside(path)
        return
    except (OSError, RunError):  # not readable: the code that reads it reports this
        return
    if not at_end and _step_of(figures, config) <= step:
        return
    text = read_small(path)
    split = re.sub(r"[^\w.+-]", "_", figures.get("split", "test"))[:50]  # a part of a file's name
    parts = [] if split == "test" else [split]
    parts += ["sample"] * _is_sample(run, figures)
    step = _step_of(figures, config)
    parts += [f"step={step}"] * (step != config.train.steps)
    target = path.with_name("-".join([path.stem, *(parts or ["all"])]) + ".json")
    if target.exists():
        target = target.with_stem(f"{target.stem}-{hashlib.sha256(text).hexdigest()[:8]}")
    path.rename(target)  # if it cannot be, the figures of other weights would stay


def _step_of(figures: dict[str, Any], config: Config) -> int:
    """The step of an evaluation's weights; earlier versions recorded none of the last."""
    step: int | None = figures.get("step")
    return config.train.steps if step is None else step


def _figures(path: Path) -> dict[str, Any]:
    """Read the figures of an evaluation.

    Raises:
        ValueError: if the file has other contents.
        OSError: if it cannot be read.
    """
    figures: dict[str, Any] = read_json(path)
    check_record(figures, Evaluation)
    return figures


def _put_damaged_aside(path: Path) -> None:
    """Rename unreadable figures, so that the run can be evaluated again."""
    target = path.with_name(f"damaged-{path.name}")
    if target.exists():
        target = target.with_stem(f"{target.stem}-{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):
        path.rename(target)
        warn(f"{path}: damaged; renamed to {target.name}, and evaluating again")


def _is_sample(run: Path, figures: dict[str, Any]) -> bool:
    """Whether figures are those of the recipe's sample; earlier versions did not record this."""
    recorded = figures.get("sample")
    if recorded is not None:
        return bool(recorded)
    return (run / CONFIG).is_file() and recipe_of(run).evaluation.at_end == "sample"


def check_finished(
    run: Path, config: Config, plan: DecayPlan, checkpoint: Checkpoint, until: int | None
) -> None:
    """Refuse changes that a run cannot follow after its last update.

    Args:
        plan: the recipe's λ.
        checkpoint: the newest one.

    Raises:
        UsageError: with both values.
    """
    if until is not None and until < checkpoint.step:
        steps = [step_of(folder) for folder in list_checkpoints(run / CHECKPOINTS)]
        if until not in steps:
            raise UsageError(
                f"--until: {until} is before step {checkpoint.step} of {run}, which keeps no "
                f"checkpoint of it (it has {', '.join(map(str, steps))}); choose another --out"
            )
    end = "its last step" if until is None else f"--until {until}"
    intro = f"{run}: was trained to {end}, its newest checkpoint has step {checkpoint.step},"
    fork = fork_words(run, checkpoint.step, config.train.steps)
    mend = f"keep that, or choose another --out ({fork} continues from it)"
    # A folder that was lost and fetched from its mirror has only checkpoints.
    recorded = recipe_of(run) if (run / CONFIG).is_file() else checkpoint.config
    changed = {
        key: values
        for key, values in differences(recorded, config, _LATE).items()
        if not is_free(key)
    }
    for key, (before, after) in changed.items():
        others = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UsageError(
            f"{intro} with {key}={as_written(before)}, the recipe says "
            f"{as_written(after)}{others}; {mend}"
        )
    if config.resume.decay != "checkpoint" and (moved := decay_changes(plan, checkpoint, config)):
        raise UsageError(f"{intro} with another weight decay: {moved}; {mend}")


def is_free(key: str) -> bool:
    """Whether a finished run may be started again with another value of a key."""
    return any(key == free or key.startswith(f"{free}.") for free in FREE)

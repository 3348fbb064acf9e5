"""Checks lengths of a recipe: ambiguous shares or steps, and phases that no run could have.

Values that cannot be intended are refused. Values that have no effect in a run of this length are
reported at the start and in the dry run.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator

from pretrain.cli.console import warn
from pretrain.config.extension import running
from pretrain.config.recipe import Config, entries
from pretrain.config.schedule import in_steps
from pretrain.config.science import ScheduleConfig
from pretrain.decay.policy import PolicySection
from pretrain.decay.sites import KEY
from pretrain.errors import UsageError

_RATE = "optimizer.schedule"


_OF_LENGTHS = ("train", "optimizer", "checkpoint", "evaluation")
"""Sections of a recipe that have lengths."""


def check_lengths(config: Config, existing: Config | None = None) -> None:
    """Refuse lengths that are ambiguous or meaningless.

    Args:
        existing: the recipe of the existing run; an earlier version accepted its values.

    Raises:
        UsageError: naming the key and what to do.
    """
    if existing and all(getattr(existing, name) == getattr(config, name) for name in _OF_LENGTHS):
        return
    steps = config.train.steps
    for key, value in _lengths(config):
        if isinstance(value, float) and value == 1:
            end = ", or remove it for the end of the run" if key.endswith("stop") else ""
            raise UsageError(
                f"{key}: 1.0 could be one step or the whole run; write 1 for one step, {steps} for "
                f"all steps{end}"
            )
        if value > 1 and value != round(value):
            raise UsageError(
                f"{key}: {value:g} is not a share (below 1) or a whole number of steps"
            )
    for key, section in _policies(config):
        section.check_lengths(key, steps)
    _check_best(config)


def _check_best(config: Config) -> None:
    saves, evaluations = config.interval("checkpoint"), config.interval("evaluation")
    if config.checkpoint.keep_best and config.checkpoint.keep and saves % evaluations:
        raise UsageError(
            f"checkpoint.every: {saves} is not a multiple of evaluation.every {evaluations}, but "
            "keep_best compares the held-out losses of checkpoints; use "
            f"{-(-saves // evaluations) * evaluations}, or evaluation.every {saves}"
        )


def remarks(config: Config) -> list[str]:
    """One line for each setting that has no effect in the run, and for each code file that it
    runs."""
    return [
        *_of_the_rate(config),
        *_of_policies(config),
        *_of_checkpoints(config),
        *_of_code(config),
    ]


def say_remarks(configs: Iterable[Config], before: Config | None = None) -> None:
    """Warn of what `remarks` has about some recipes, each line once.

    Args:
        before: the recipe of the last start in this run folder; code that ran then is not named
            again.
    """
    known = set(_of_code(before)) if before else set()
    times = Counter(line for config in configs for line in remarks(config) if line not in known)
    for line, count in times.items():
        warn(line + (f" ({count} runs)" if count > 1 else ""))


def _lengths(config: Config) -> Iterator[tuple[str, float]]:
    """Every key that is a share or a number of steps, with its value."""
    schedule = config.optimizer.schedule
    yield f"{_RATE}.warmup", schedule.warmup
    if schedule.kind == "wsd":
        yield f"{_RATE}.decay", schedule.decay
    for key, section in _policies(config):
        for name, value in section.lengths().items():
            yield f"{key}.{name}", value


def _policies(config: Config) -> Iterator[tuple[str, PolicySection]]:
    for index, section in enumerate(config.optimizer.weight_decay.policies):
        yield f"{KEY}.policies[{index}]", section


def _of_the_rate(config: Config) -> Iterator[str]:
    schedule, steps, warmup = config.optimizer.schedule, config.train.steps, config.warmup_steps
    if warmup >= steps:
        yield (
            f"{_RATE}.warmup: {warmup:,} steps in a run of {steps:,}: the learning rate ends at "
            f"{100 * steps / (warmup + 1):.3g} % of optimizer.learning_rate"
        )
        return
    remaining = steps - warmup
    if schedule.kind == "constant":
        if schedule.final_fraction != ScheduleConfig.model_fields["final_fraction"].default:
            yield f"{_RATE}.final_fraction: has no effect on a constant rate"
        return
    decay_steps = remaining
    if schedule.kind == "wsd":
        decay_steps = in_steps(schedule.decay, steps)
        if decay_steps > remaining:
            yield (
                f"{_RATE}.decay: {decay_steps:,} steps are shortened to the {remaining:,} that the "
                "warm-up leaves"
            )
    fall = min(decay_steps, remaining)
    if fall < 2:
        yield (
            f"{_RATE}: the decay phase of {schedule.kind} has {'one step' if fall else 'no step'} "
            f"in a run of {steps:,} with {warmup:,} of warm-up: the learning rate stays at its peak"
        )


def _of_policies(config: Config) -> Iterator[str]:
    steps, decay = config.train.steps, config.optimizer.weight_decay
    for key, section in _policies(config):
        yield from section.length_remarks(key, steps)
    if decay.nuclear_every > steps:
        yield f"{KEY}.nuclear_every: {decay.nuclear_every:,} steps in a run of {steps:,}"


def _of_code(config: Config) -> Iterator[str]:
    """One line for each of the user's code files that runs."""
    for key, section in entries(config):
        code = running(getattr(section, "sha256", ""))
        if code is not None:
            yield f"{key}: runs {code.path} (SHA-256 {code.sha256})"


def _of_checkpoints(config: Config) -> Iterator[str]:
    settings, every = config.checkpoint, config.interval("checkpoint")
    common = math.lcm(settings.keep_every, every) if settings.keep_every else 0
    if settings.keep and common > settings.keep_every:
        yield (
            f"checkpoint.keep_every: of the multiples of {settings.keep_every:,} only those of "
            f"{common:,} are saved (checkpoint.every {every:,})"
        )

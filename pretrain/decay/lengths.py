"""Lengths of a recipe: shares and steps that cannot be told apart, phases that no run could have.

What cannot be meant is refused; what can, but does nothing in a run of so many steps, is said at
the start and in the dry run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from pretrain.config.decay import AlphaDecay, RankTarget, ScheduleDecay
from pretrain.config.recipe import Config, ScheduleConfig
from pretrain.config.schedule import decay_multiplier, in_steps
from pretrain.decay.plan import KEY
from pretrain.errors import UsageError

_RATE = "optimizer.schedule"


_OF_LENGTHS = ("train", "optimizer", "checkpoint", "evaluation")
"""Sections of a recipe that have lengths."""


def check_lengths(config: Config, known: Config | None = None) -> None:
    """Refuse lengths that mean two things, or nothing.

    Args:
        known: the recipe of the run that is there; what it has already, an earlier version took.

    Raises:
        UsageError: naming the key and the mend.
    """
    if known and all(getattr(known, one) == getattr(config, one) for one in _OF_LENGTHS):
        return
    steps = config.train.steps
    for key, value in _lengths(config):
        if isinstance(value, float) and value == 1:
            end = ", or leave it out for the end of the run" if key.endswith("stop") else ""
            raise UsageError(
                f"{key}: 1.0 may be one step or the whole run; write 1 for a step, {steps} for all "
                f"of them{end}"
            )
        if value > 1 and value != round(value):
            raise UsageError(
                f"{key}: {value:g} is neither a share (below 1) nor a whole number of steps"
            )
    for key, one in _schedules(config):
        if one.stop is None or one.shape == "step":
            continue
        comparable = (one.start < 1) == (one.stop < 1)
        if (comparable and one.start >= one.stop) or _span(one, steps) < 0:
            raise UsageError(
                f"{key}.stop: {one.stop:g} is not after start {one.start:g} in a run of {steps} "
                "steps; exchange them"
            )
    _check_best(config)


def _check_best(config: Config) -> None:
    saves, evaluations = config.interval("checkpoint"), config.interval("evaluation")
    if config.checkpoint.keep_best and config.checkpoint.keep and saves % evaluations:
        raise UsageError(
            f"checkpoint.every: {saves} is no multiple of evaluation.every {evaluations}, and "
            "keep_best compares held-out losses of what is saved; use "
            f"{-(-saves // evaluations) * evaluations}, or evaluation.every {saves}"
        )


def remarks(config: Config) -> list[str]:
    """What a recipe asks for that a run of its length does not have, one line each."""
    return [*_of_the_rate(config), *_of_policies(config), *_of_checkpoints(config)]


def _lengths(config: Config) -> Iterator[tuple[str, float]]:
    """Every key that is a share or a number of steps, with its value."""
    schedule = config.optimizer.schedule
    yield f"{_RATE}.warmup", schedule.warmup
    if schedule.kind == "wsd":
        yield f"{_RATE}.decay", schedule.decay
    for key, one in _schedules(config):
        yield f"{key}.start", one.start
        if one.stop is not None:
            yield f"{key}.stop", one.stop


def _schedules(config: Config) -> Iterator[tuple[str, ScheduleDecay]]:
    for index, one in enumerate(config.optimizer.weight_decay.policies):
        if isinstance(one, ScheduleDecay):
            yield f"{KEY}.policies[{index}]", one


def _span(one: ScheduleDecay, steps: int) -> int:
    """Steps from start to stop."""
    stop = steps if one.stop is None else in_steps(one.stop, steps)
    return stop - in_steps(one.start, steps)


def _of_the_rate(config: Config) -> Iterator[str]:
    schedule, steps, warmup = config.optimizer.schedule, config.train.steps, config.warmup_steps
    if warmup >= steps:
        yield (
            f"{_RATE}.warmup: {warmup:,} steps in a run of {steps:,}: the learning rate ends at "
            f"{100 * steps / (warmup + 1):.3g} % of optimizer.learning_rate"
        )
        return
    left = steps - warmup
    if schedule.kind == "constant":
        if schedule.final_fraction != ScheduleConfig.model_fields["final_fraction"].default:
            yield f"{_RATE}.final_fraction: does nothing to a constant rate"
        return
    wanted = left
    if schedule.kind == "wsd":
        wanted = in_steps(schedule.decay, steps)
        if wanted > left:
            yield (
                f"{_RATE}.decay: {wanted:,} steps are cut to the {left:,} that the warm-up leaves"
            )
    fall = min(wanted, left)
    if fall < 2:
        yield (
            f"{_RATE}: the fall of {schedule.kind} has {'one step' if fall else 'no step'} in a "
            f"run of {steps:,} with {warmup:,} of warm-up: the learning rate stays at its peak"
        )


def _of_policies(config: Config) -> Iterator[str]:
    steps, decay = config.train.steps, config.optimizer.weight_decay
    for key, one in _schedules(config):
        yield from _of_a_schedule(key, one, steps)
    for index, policy in enumerate(decay.policies):
        key = f"{KEY}.policies[{index}]"
        if isinstance(policy, AlphaDecay) and policy.refresh >= steps:
            yield (
                f"{key}.refresh: {policy.refresh:,} steps in a run of {steps:,}: the exponents are "
                "those of the first weights throughout"
            )
        if isinstance(policy, RankTarget) and policy.every >= steps:
            yield f"{key}.every: {policy.every:,} steps in a run of {steps:,}: never in control"
    if decay.nuclear_every > steps:
        yield f"{KEY}.nuclear_every: {decay.nuclear_every:,} steps in a run of {steps:,}"


def _of_a_schedule(key: str, one: ScheduleDecay, steps: int) -> Iterator[str]:
    begin, span = in_steps(one.start, steps), _span(one, steps)
    if one.shape == "step" and one.stop is not None:
        yield f"{key}.stop: does nothing to the shape step, which jumps at start"
    if one.shape == "warmup" and one.last:
        yield f"{key}.last: does nothing to the shape warmup, which ends at first"
    found = _multipliers(one, steps)
    if len(found) == 1 and one.first != one.last:
        yield f"{key}: λ is multiplied by {found.pop():g} in every update of a run of {steps:,}"
    elif one.shape != "step":
        if begin + span > steps:
            yield f"{key}.stop: step {begin + span:,} is after the last of a run of {steps:,}"
        if span < 2 and one.shape != "window":
            yield (
                f"{key}: {one.shape} has {'one step' if span else 'no step'} from start to stop in "
                f"a run of {steps:,}"
            )


def _multipliers(one: ScheduleDecay, steps: int) -> set[float]:
    """What λ is multiplied by in the updates where that could change."""
    begin = in_steps(one.start, steps)
    end = begin + _span(one, steps)
    places = {0, begin - 1, begin, begin + 1, end - 1, end, steps - 1}
    return {
        decay_multiplier(step, steps, one.shape, one.start, one.stop, one.first, one.last)
        for step in places
        if 0 <= step < steps
    }


def _of_checkpoints(config: Config) -> Iterator[str]:
    settings, every = config.checkpoint, config.interval("checkpoint")
    common = math.lcm(settings.keep_every, every) if settings.keep_every else 0
    if settings.keep and common > settings.keep_every:
        yield (
            f"checkpoint.keep_every: of the multiples of {settings.keep_every:,} only those of "
            f"{common:,} are saved (checkpoint.every {every:,})"
        )

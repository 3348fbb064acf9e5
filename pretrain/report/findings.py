"""What a report says in words: what was compared, what was found, and what cannot be said."""

from __future__ import annotations

import math

from pretrain.report.compare import (
    FEW,
    LEVEL,
    MEASURES,
    Difference,
    Mean,
    Measure,
    condition_mean,
    differences_from,
)
from pretrain.report.figure_parts import counted, tokens_of
from pretrain.report.load import EXPOSURE, Condition, Study
from pretrain.sweep.config import short_names

_MOST_VALUES = 6
"""Number of values that a title lists."""
_MOST_NAMED = 3
"""Number of clear differences whose conditions are named."""
_POLICIES = "optimizer.weight_decay.policies"
_NO_POLICY = "none"
"""The name of an empty list of them (`sweep.config.kinds_of`)."""


def headline(study: Study) -> str:
    """What was compared: the keys that vary and their values."""
    keys = list(study.conditions[0].values)
    if not keys:
        return f"Rank of attention in {study.title}"
    if keys == [_POLICIES]:
        return _headline_of_policies(study)
    short = short_names(keys)
    names = " × ".join(short[key] for key in keys)
    if all(condition.name.startswith(EXPOSURE) for condition in study.conditions):
        names = f"Exposure of {names}"
    elif all(key.startswith("optimizer.weight_decay.") for key in keys):
        names = f"Weight decay of {names}"
    if len(keys) > 1:
        return f"{names}: {counted(len(study.conditions), 'condition')} compared"
    return f"{names}: {_listed(_values(study))} compared"


def _headline_of_policies(study: Study) -> str:
    """What was compared, where only the policies vary."""
    values = sorted(_values(study), key=lambda value: value == _NO_POLICY)
    if len(values) == 2 and values[1] == _NO_POLICY:
        policy = "policies" if "+" in values[0] else "policy"
        return f"Weight decay with and without the {policy} {values[0]} compared"
    return f"Weight decay by policy: {_listed(values)} compared"


def _values(study: Study) -> list[str]:
    """What differs between the conditions, of which one key varies."""
    return [condition.name.partition(" = ")[2] for condition in study.conditions]


def _listed(values: list[str]) -> str:
    if len(values) > _MOST_VALUES:
        return f"{len(values)} values"
    return f"{', '.join(values[:-1])} and {values[-1]}"


def findings(study: Study) -> list[str]:
    """Three sentences: rank, held-out figures, and what cannot be said from these runs."""
    if len(study.conditions) == 1:
        return _of_one_condition(study)
    far = _farthest(study)
    return [_of_ranks(study, far), _of_held_out(study, far), _limits(study)]


def _farthest(study: Study) -> Condition:
    """The condition whose exposure differs most from the baseline's: chosen without its results."""
    others = [condition for condition in study.conditions if condition is not study.baseline]
    distances = {one.name: abs(one.exposure - study.baseline.exposure) for one in others}
    known = [one for one in others if not math.isnan(distances[one.name])]
    return max(known or others, key=lambda one: distances[one.name])


def _of_one_condition(study: Study) -> list[str]:
    only = study.conditions[0]
    ranks = [
        f"{_mean(condition_mean(only, MEASURES[key][1]))} of {name}"
        for key, name in (("rank_qk", "W_QK"), ("rank_vp", "W_VP"))
    ]
    seeds = counted(len(only.runs), "seed")
    title, measure = _scored(study)
    held_out = f"Held-out {title} is {_mean(condition_mean(only, measure))} (n = {seeds})."
    if not _is_scored(study, measure):
        held_out = "No run has held-out figures of its end."
    return [
        f"The mean pseudo-rank is {' and '.join(ranks)} (n = {seeds}).",
        held_out,
        "There is one condition, so these runs cannot say what decay, or any other setting, does.",
    ]


def _of_ranks(study: Study, far: Condition) -> str:
    parts = []
    for key, name in (("rank_qk", "W_QK"), ("rank_vp", "W_VP")):
        measure = MEASURES[key][1]
        before, after = (condition_mean(one, measure) for one in (study.baseline, far))
        versus = _against(study, far, measure)
        parts.append(
            f"mean pseudo-rank of {name} is {before.value:.3f} with {study.baseline.name} and "
            f"{after.value:.3f} with {far.name} ({versus})"
        )
    return f"The {parts[0]}; the {parts[1]}."


def _of_held_out(study: Study, far: Condition) -> str:
    title, measure = _scored(study)
    differences = differences_from(study, measure)
    if not _is_scored(study, measure):
        return "No run has held-out figures of its end, so nothing can be said about quality."
    return (
        f"Held-out {title} {_apart(study.baseline, differences)}; with {far.name} the "
        f"{_against(study, far, measure)}."
    )


def _apart(baseline: Condition, differences: list[Difference]) -> str:
    """In which conditions a figure differs clearly from the baseline's."""
    others = counted(len(differences), "other condition")
    tested = [difference for difference in differences if not difference.why_untested]
    if not tested:
        return f"could not be tested against {baseline.name} ({differences[0].why_untested})"
    if all(difference.n < FEW for difference in tested):
        return (
            f"is not called clearly different from {baseline.name} in any of {others} (fewer than "
            f"{FEW} pairs)"
        )
    clear = [difference for difference in tested if difference.is_clear]
    level = f"p < {LEVEL:g}, corrected"
    if not clear:
        return f"does not differ clearly from {baseline.name} in any of {others} ({level})"
    less = [difference for difference in clear if difference.mean < 0]
    more = [difference for difference in clear if difference.mean >= 0]
    named = len(clear) <= _MOST_NAMED
    counts = [
        f"{word} in {len(some)}{_names(some) if named else ''}"
        for word, some in (("lower", less), ("higher", more))
        if some
    ]
    return f"is clearly {' and '.join(counts)} of {others} than with {baseline.name} ({level})"


def _names(differences: list[Difference]) -> str:
    return f" ({'; '.join(difference.condition.name for difference in differences)})"


def _limits(study: Study) -> str:
    """What these runs cannot say."""
    differences = differences_from(study, _scored(study)[1])
    unclear = [difference.condition.name for difference in differences if not difference.is_clear]
    reasons = []
    if all(len(condition.runs) == 1 for condition in study.conditions):
        reasons.append("one seed: no interval, and no difference can be told from chance")
    elif few := _of_few_pairs(differences):
        reasons += few
    elif unclear:
        reasons.append(
            f"{counted(len(unclear), 'condition')} without a clear difference "
            f"({_few(unclear)}): not shown to differ is not shown to be equal"
        )
    unfinished = sum(not run.is_finished for run in study.runs)
    if unfinished:
        reasons.append(f"{counted(unfinished, 'run')} not finished: figures are of now, not of the "
                       "end")  # fmt: skip
    model = study.runs[0].config.model
    reasons.append(
        "another model, data set or length may behave otherwise (here "
        f"{counted(model.num_layers, 'layer')} of width {model.hidden_size} and "
        f"{tokens_of(study.runs[0])})"
    )
    return f"What these runs cannot say: {'; '.join(reasons)}."


def _of_few_pairs(differences: list[Difference]) -> list[str]:
    """What few pairs cannot say; a condition without any is in no comparison."""
    counts = {difference.n for difference in differences if difference.n}
    if counts == {1}:
        return ["one pair: no interval, and no difference can be told from chance"]
    single = [difference.condition.name for difference in differences if difference.n == 1]
    reasons = [f"one pair with {_few(single)}: no interval"] if single else []
    few = [count for count in counts if 1 < count < FEW]
    if few:
        reasons.append(f"{counted(min(few), 'pair')} of seeds: the intervals have little meaning")
    return reasons


def _scored(study: Study) -> tuple[str, Measure]:
    """The held-out figure that is reported: perplexity, else bits per byte."""
    found = [MEASURES[key] for key in ("perplexity", "bits_per_byte")]
    return next((one for one in found if _is_scored(study, one[1])), found[0])


def _is_scored(study: Study, measure: Measure) -> bool:
    values = [measure(run) for run in study.runs]
    return any(value is not None and math.isfinite(value) for value in values)


def _against(study: Study, far: Condition, measure: Measure) -> str:
    """``difference is -0.633, 95 % interval [-0.66, -0.60], n = 3 pairs``."""
    difference = next(one for one in differences_from(study, measure) if one.condition is far)
    if not difference.n:
        return "difference is not known, without a pair of runs"
    return (
        f"difference is {difference.mean:+.4g}, {_interval(difference)}, "
        f"n = {counted(difference.n, 'pair')}"
    )


def _interval(difference: Difference) -> str:
    if math.isnan(difference.low):
        return "no interval"
    return f"95 % interval [{difference.low:+.4g}, {difference.high:+.4g}]"


def _mean(mean: Mean) -> str:
    error = "" if math.isnan(mean.error) else f" ± {mean.error:.3g}"
    return f"{mean.value:.4g}{error}"


def _few(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

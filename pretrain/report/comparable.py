"""Checks which runs may be compared, before any mean or pair; messages name both values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pretrain.errors import UsageError
from pretrain.report.runs import RunData


def check_same(runs: list[RunData]) -> None:
    """Refuse runs whose figures measure different things.

    Raises:
        UsageError: naming two runs and what differs.
    """
    sourced = [run for run in runs if run.source]
    for run in sourced[1:]:
        for index, name in ((1, "tokenizer"), (0, "data")):
            if run.source[index] != sourced[0].source[index]:  # type: ignore[index]
                raise UsageError(
                    f"{run.path}: has another {name} than {sourced[0].path}, so their figures "
                    "cannot be compared; report them separately"
                )
    for run in runs[1:]:
        mine, other = _definition(run), _definition(runs[0])
        if mine != other:
            raise UsageError(
                f"{run.path}: its pseudo-rank uses {mine}, that of {runs[0].path} uses {other}; "
                "they cannot be compared; report them separately"
            )


def _definition(run: RunData) -> str:
    ranks = run.config.ranks
    return f"ranks.threshold {ranks.threshold:g} and ranks.denominator {ranks.denominator}"


def _documents(evaluation: dict[str, Any]) -> str | None:
    if "documents_sha256" not in evaluation:  # a task without text
        return (
            str(evaluation["overall"].get("samples"))
            if "samples" in evaluation["overall"]
            else None
        )
    count = evaluation["overall"].get("documents", "some")
    return f"{count} (sha256 {evaluation['documents_sha256'][:8]})"


def _stride(run: RunData, evaluation: dict[str, Any]) -> Any:
    """The stride as a setting; windows without overlap are one setting for every context."""
    context = evaluation.get("context", run.config.model.context)
    stride = evaluation.get("stride")
    return "the context" if stride == context else stride


def _precision(run: RunData, evaluation: dict[str, Any]) -> str | None:
    precision = evaluation.get("precision")
    return "that of training" if precision and precision == run.precision else precision


_SETTINGS: dict[str, Callable[[RunData, dict[str, Any]], Any]] = {
    "split": lambda run, evaluation: evaluation.get("split"),
    "documents": lambda run, evaluation: _documents(evaluation),
    "stride": _stride,
    "precision": _precision,
    "attention rank": lambda run, evaluation: evaluation.get("attention_rank", "whole"),
}
"""Settings of an evaluation that change its figures; None: not known (older folders)."""


def with_comparable_scores(runs: list[RunData]) -> tuple[list[RunData], list[str]]:
    """The runs, without held-out figures whose settings differ from those of most runs.

    Returns:
        The runs in their order, and notes that name each run whose figures are left out.
    """
    notes: list[str] = []
    wanted = {name: _usual(runs, name) for name in _SETTINGS}
    comparable = []
    for run in runs:
        odd = _odd(run, wanted)
        if run.evaluation is None and any(other.evaluation for other in runs):
            odd = "it was not evaluated"
        if odd:
            notes.append(f"held-out figures left out: {run.path}: {odd}")
        comparable.append(replace(run, evaluation=None) if odd else run)
    return comparable, notes


def _usual(runs: list[RunData], name: str) -> Any:
    """The value that most runs have; in a tie, the first."""
    values = [_SETTINGS[name](run, run.evaluation) for run in runs if run.evaluation]
    counts = Counter(value for value in values if value is not None)
    return counts.most_common(1)[0][0] if counts else None


def _odd(run: RunData, wanted: dict[str, Any]) -> str:
    """Why held-out figures cannot be compared, with both values."""
    if run.evaluation is None:
        return ""
    reasons = []
    for name, read in _SETTINGS.items():
        value = read(run, run.evaluation)
        if value is not None and value != wanted[name]:
            reasons.append(f"{name} {value}, the others' {wanted[name]}")
    step, last = run.evaluation.get("step"), run.config.train.steps
    if step is not None and step != last and run.last_step >= last:
        reasons.append(f"of step {step}, not of its last, {last}")
    return "; ".join(reasons)


def differences_of_pair(run: RunData, other: RunData, only: set[str]) -> list[str]:
    """Why two runs of one seed are not a pair, each reason with both values; empty for a pair.

    Args:
        only: keys in which their conditions differ; if it is a single key, it is being studied.
    """
    if not run.identity or not other.identity:
        lacking = run if not run.identity else other
        return [f"{lacking.path} has no hashes of its initial weights and data order"]
    reasons = []
    if not run.ancestors & other.ancestors:
        reasons.append("differ in initial weights" + _of_a_fork(run, other))
    if run.identity["data_order"] != other.identity["data_order"]:
        reasons.append("differ in data order")
    both_known = run.precision and other.precision
    if both_known and run.precision != other.precision and only != {"precision"}:
        reasons.append(f"trained in {run.precision} and in {other.precision}")
    for word, mine, its in (
        ("left out blocks of samples", run.jumped, other.jumped),
        ("skipped updates", *_apart(run, other)),
    ):
        if mine != its:
            reasons.append(f"{word}: {_few(mine)} and {_few(its)}")
    return reasons


def _of_a_fork(run: RunData, other: RunData) -> str:
    """What is said of a fork whose trunk is not known."""
    lost = [one for one in (run, other) if one.forked_at and not one.trunks]
    if not lost:
        return ""
    return f" ({lost[0].path} is a fork, and the initial weights of its trunk are not known)"


def _apart(run: RunData, other: RunData) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The updates that each of two runs skipped, without those that a fork has from its trunk.

    The records of a fork begin after the checkpoint from which it was forked.
    """
    common = max((one.forked_at for one, trunk in ((run, other), (other, run))
                  if one.is_fork_of(trunk)), default=0)  # fmt: skip
    mine, its = (tuple(step for step in one.skipped if step > common) for one in (run, other))
    return mine, its


def _few(values: tuple[int, ...]) -> str:
    text = ", ".join(map(str, values[:5])) or "none"
    return text + f" and {len(values) - 5} more" * (len(values) > 5)


def mixed(name: str, runs: list[RunData]) -> list[str]:
    """A note on a condition whose runs were trained in different precisions."""
    counts = Counter(run.precision for run in runs if run.precision)
    if len(counts) < 2:
        return []
    words = ", ".join(f"{precision} ({n})" for precision, n in counts.items())
    return [f"{name}: its runs were trained in different precisions: {words}"]

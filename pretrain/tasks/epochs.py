"""Computes how often a run sees its data: tokens and epochs of every subset."""

from __future__ import annotations

from typing import Any

from pretrain.config.recipe import Config
from pretrain.tasks.task import Task, Uses

_MOST = 6
"""Number of subsets that a line names."""


def uses_of(task: Task, config: Config) -> Uses:
    """What a run of this recipe uses of every subset; empty if samples are generated."""
    return task.uses(config)


def in_words(uses: Uses, unit: str) -> str:
    """One line: the total, then the subsets that are seen most often.

    Args:
        unit: what is counted: ``tokens`` or ``samples``.
    """
    seen = sum(int(use["seen"]) for use in uses.values())
    corpus = sum(int(use["corpus"]) for use in uses.values())
    text = f"{seen:,} {unit} of {corpus:,}: {seen / max(1, corpus):.3g} epochs"
    if len(uses) < 2:
        return text
    most = sorted(uses, key=lambda name: -uses[name]["epochs"])[:_MOST]
    parts = ", ".join(f"{name} {uses[name]['epochs']:.3g}" for name in most)
    return f"{text} ({parts}{', ...' * (len(uses) > _MOST)})"


def unit_of(config: Config) -> str:
    """The unit that `uses_of` counts for a recipe."""
    return "tokens" if config.task.kind == "text" else "samples"


def describe(task: Task, config: Config) -> dict[str, Any]:
    """Unit and subsets, for the run folder and the dry run."""
    return {"unit": unit_of(config), "subsets": uses_of(task, config)}

"""How often a run sees its data: tokens and epochs of every subset, from recipe and manifest."""

from __future__ import annotations

from typing import Any

from pretrain.config.recipe import Config
from pretrain.tasks.task import Task, Uses

_MOST = 6
"""Subsets that a line names."""


def uses_of(task: Task, config: Config) -> Uses:
    """What a run of this recipe takes from every subset; empty where samples are made up."""
    return task.uses(config)


def in_words(uses: Uses, unit: str) -> str:
    """One line: the whole, then the subsets that are seen most often.

    Args:
        unit: what is counted: ``tokens``, or ``samples``.
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
    """What `uses_of` counts for a recipe."""
    return "tokens" if config.task.kind == "text" else "samples"


def describe(task: Task, config: Config) -> dict[str, Any]:
    """For the run folder and the dry run: unit and subsets."""
    return {"unit": unit_of(config), "subsets": uses_of(task, config)}

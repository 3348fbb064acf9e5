"""How often a run sees its data: tokens and epochs of every subset, from recipe and manifest."""

from __future__ import annotations

from typing import Any

from data_pipeline.dataset import blend_weights
from pretrain.config.recipe import Config
from pretrain.tasks.tasks import ImageClasses, Task, Text

Uses = dict[str, dict[str, float]]
"""By subset: ``corpus``, its training tokens (or images); ``seen``, those that the run takes,
repetitions counted; ``epochs``, how often each is seen."""
_MOST = 6
"""Subsets that a line names."""


def uses_of(task: Task, config: Config) -> Uses:
    """What a run of this recipe takes from every subset; empty where samples are made up."""
    samples = config.train.steps * config.train.global_batch
    if isinstance(task, Text):
        shares = blend_weights(task.manifest, config.data.weights)
        sizes = {entry.subset: entry.tokens for entry in task.manifest.split("train")}
        tokens = samples * config.model.context
        return {
            name: _use(sizes[name], round(share * tokens)) for name, share in sorted(shares.items())
        } | {name: _use(sizes[name], 0) for name in sorted(sizes.keys() - shares.keys())}
    if isinstance(task, ImageClasses):
        return {"images": _use(task.images, samples)}
    return {}


def _use(corpus: int, seen: int) -> dict[str, float]:
    return {"corpus": corpus, "seen": seen, "epochs": float(f"{seen / max(1, corpus):.6g}")}


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

"""Run folders that somebody else's loop wrote (`pretrain.api`), and not this program's training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.files import read_json
from pretrain.config.mapping import read_mapping
from pretrain.errors import RunError, UsageError

LOOP = "loop.json"
"""The record of the loop; a run folder that has it cannot be trained in."""
NOT_RECORDED = "not recorded"
"""What stands for a value of the recipe that is not known of a loop's run."""
_WHOLE = "checkpoint"
"""A section that only earlier versions wrote: they wrote every key, most with a default."""
_GIVEN = {
    "seed": "seed",
    "train.global_batch": "global_batch",
    "optimizer.learning_rate": "learning_rate",
}
"""Keys that a loop may give, with their names in its record."""
_MEASURED = ("model.", "ranks.", "optimizer.weight_decay.", "evaluation.at_end", "train.steps")
"""Keys of earlier versions that came from the model itself, and from the end of the loop."""


def refuse_loop(run: Path) -> None:
    """Refuse to train in the run folder of another loop.

    Raises:
        UsageError: naming the folder.
    """
    if (run / LOOP).exists():
        raise UsageError(f"{run}: holds the run of another loop ({LOOP}); choose another --out")


def recorded_keys(run: Path, config: Path) -> frozenset[str] | None:
    """Dotted keys of the recipe that are known of a loop's run.

    Args:
        config: its recipe, of which only known keys are facts.

    Returns:
        None for a run of this program's own training: its recipe is whole.

    Raises:
        RunError, UsageError: if one of the two files is damaged.
    """
    if not (run / LOOP).is_file():
        return None
    tree = read_mapping(config, "recipe", "sections, such as `model:`")
    keys = flat(tree)
    if _WHOLE in tree:
        given = _given(run)
        keys = {key: keys[key] for key in keys if key.startswith(_MEASURED) or key in given}
    return frozenset(keys)


def _given(run: Path) -> set[str]:
    """The keys that a loop gave, by its record."""
    try:
        about = read_json(run / LOOP)
        return {key for key, name in _GIVEN.items() if about.get(name) is not None}
    except (OSError, ValueError, AttributeError):
        raise RunError(f"{run / LOOP}: damaged; restore it from a copy") from None


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a tree by dotted key, in their order."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        inside = isinstance(value, dict) and value
        values |= flat(value, f"{prefix}{key}.") if inside else {f"{prefix}{key}": value}
    return values


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """The tree of values by dotted key: the inverse of `flat`."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return tree

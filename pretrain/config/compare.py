"""How two recipes differ."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from pretrain.config.recipe import Config

SCIENCE = ("seed", "model", "task", "data", "train", "optimizer", "precision")
"""Sections that a resumed run must keep; others (grid, logging, ...) may change."""


def differences(old: Config, new: Config, sections: tuple[str, ...] = SCIENCE) -> dict[str, Any]:
    """Dotted keys whose values differ, with both values."""
    return {
        key: (before, after)
        for section in sections
        for key, (before, after) in _differ(
            section, _plain(getattr(old, section)), _plain(getattr(new, section))
        ).items()
    }


def as_written(value: Any) -> str:
    """A value as it stands in a recipe: null, true, or the value itself."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _differ(key: str, old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        changes: dict[str, tuple[Any, Any]] = {}
        for part in {**old, **new}:
            changes |= _differ(f"{key}.{part}", old.get(part), new.get(part))
        return changes
    return {} if old == new else {key: (old, new)}

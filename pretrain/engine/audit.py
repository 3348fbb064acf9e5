"""Checks that an optimizer holds the λ and η that the plan gives each tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from models.roles import ParameterInfo
from pretrain.engine.masters import Fragment
from pretrain.errors import RunError


def audit_groups(
    fragments: Iterable[Fragment],
    decay_of: Callable[[ParameterInfo], float],
    rate_of: Callable[[ParameterInfo], float],
) -> None:
    """Compare the groups of this process's optimizer with the plan.

    Args:
        decay_of: the λ that the optimizer itself must hold for a parameter.
        rate_of: its η.

    Raises:
        RunError: naming the first tensor that would be decayed or updated wrongly.
    """
    for fragment in fragments:
        info, group = fragment.info, fragment.group
        held = {
            "decay": (group["weight_decay"], decay_of(info)),
            "learning rate": (group["lr"], rate_of(info)),
        }
        for word, (actual, planned) in held.items():
            if float(actual) != planned:
                raise RunError(
                    f"{info.name}: the optimizer holds {word} {actual:g}, but the plan has "
                    f"{planned:g} (group {group.get('name')}); this is a bug, please report "
                    "it with the recipe"
                )

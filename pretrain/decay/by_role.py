"""Rates and direction of decay by role: applies the settings of a recipe to a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from models.roles import ALIASES, QK, VO, Role
from pretrain.decay.plan import roles_of
from pretrain.decay.sites import KEY, Site
from pretrain.errors import UsageError

RATES = "optimizer.learning_rate_by"
_MOST_A_STEP = 0.01
"""With ``coupling: none``, a larger λ removes a weight within a hundred updates."""


def named(words: Iterable[str], key: str, present: frozenset[Role]) -> frozenset[Role]:
    """The roles of a model that some words name.

    Args:
        key: the dotted key of the words, for the message.
        present: roles of the model.

    Raises:
        UsageError: if a word is not a role, or not one of the model's.
    """
    roles: set[Role] = set()
    for word in words:
        matching = present.intersection(roles_of(word, key))
        if not matching:
            raise UsageError(f"{key}: this model has no {word!r}; remove it")
        roles |= matching
    return frozenset(roles)


Setting = TypeVar("Setting", str, float)


def by_role(
    setting: Setting | Mapping[str, Setting], key: str, default: Setting, present: frozenset[Role]
) -> dict[Role, Setting]:
    """A setting, or one by role, as one for every role of a model; the most specific word wins."""
    if not isinstance(setting, Mapping):
        return dict.fromkeys(present, setting)
    chosen = dict.fromkeys(present, setting.get("default", default))
    # General words first, so that more specific ones override them.
    words = [word for word in setting if word != "default"]
    for word in sorted(words, key=lambda word: -len(ALIASES.get(word, ()))):
        chosen |= dict.fromkeys(named([word], key, present), setting[word])
    return chosen


def rate_factors(
    factors: Mapping[str, float], present: frozenset[Role] = frozenset(Role)
) -> dict[Role, float]:
    """The factor of η of every role of a model (`optimizer.learning_rate_by`).

    Raises:
        UsageError: if a word is not a role, or not one of the model's.
    """
    return by_role(factors, RATES, 1.0, present)


def check_directions(
    form: Mapping[Role, str],
    coupling: Mapping[Role, str],
    base: Mapping[Site, float],
    nuclear_every: int,
) -> None:
    """Refuse impossible directions and rates.

    Args:
        base: λ of the recipe at every site.

    Raises:
        UsageError: naming the key and what to do.
    """
    for pair in (QK, VO):
        forms = {form[role] for role in pair if role in form}
        if "nuclear" in forms and len(forms) > 1:
            raise UsageError(
                f"{KEY}.form: nuclear acts on a product: set it for both "
                f"{' and '.join(pair)} (or for {'qk' if pair is QK else 'vo'})"
            )
    for role, word in form.items():
        most = max(value for site, value in base.items() if site[0] is role)
        if word == "nuclear" and role not in QK + VO and most > 0:
            raise UsageError(
                f"{KEY}.form: nuclear works only for the products of attention, not for {role}; "
                "write form: {attention: nuclear}"
            )
        if coupling[role] == "none" and most > _MOST_A_STEP:
            raise UsageError(
                f"{KEY}.coupling: with none, every update removes the share λ of a weight, and "
                f"{role} has λ = {most:g}; use about 1e-4, at most {_MOST_A_STEP:g}"
            )
    if nuclear_every > 1 and "nuclear" not in form.values():
        raise UsageError(f"{KEY}.nuclear_every: no form is nuclear; remove it")

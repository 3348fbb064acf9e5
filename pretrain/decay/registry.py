"""From a kind in a recipe to the policy's two classes: built in, or of a user's own."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ConfigDict, create_model

from pretrain.decay.guard import Guarded
from pretrain.decay.policy import Policy, PolicySection, Setting, Want
from pretrain.errors import UsageError
from pretrain.extension import PINS, Extension, ExtensionError, find, names, running_files

GROUP = "rankdecay.policies"
"""Of entry points."""
_BUILT_IN: dict[str, type[Policy]] = {}
_OWN: dict[type[PolicySection], Extension] = {}
Kind = TypeVar("Kind", bound=type[Policy])


class AbsentSection(PolicySection):
    """A policy of a user's own whose code does not run here: its keys, as they were written."""

    model_config = ConfigDict(extra="allow")


def built_in(kind: str) -> Callable[[Kind], Kind]:
    """Register a policy of `pretrain.decay.policies` under the kind that recipes have."""

    def register(policy: Kind) -> Kind:
        _BUILT_IN[kind] = policy
        return policy

    return register


def section_class(
    values: Mapping[str, Any], folder: Path | None
) -> tuple[type[PolicySection], Mapping[str, Any]]:
    """The class that validates an entry of ``optimizer.weight_decay.policies``, and its values.

    Args:
        values: the entry, with ``kind``.
        folder: of the recipe (`pretrain.extension.find`).

    Raises:
        ExtensionError: naming the key and the mend, if there is no such policy.
    """
    kind = values["kind"]
    _load_built_in()
    if kind in _BUILT_IN:
        return _BUILT_IN[kind].Config, values
    found = find(GROUP, kind, values, folder)
    if found is not None:
        return _own_section(found), {**values, "kind": found.kind}
    if any(pin in values for pin in PINS):
        return AbsentSection, values
    known = ", ".join([*sorted(_BUILT_IN), *names(GROUP)])
    raise ExtensionError(f"{kind!r} is no policy; known: {known}, or FILE.py:CLASS")


def make_policy(section: PolicySection, setting: Setting) -> Policy:
    """The policy of a section, told of its run.

    Raises:
        UsageError: if it does not fit the run, or its code does not run here.
    """
    if missing := absent(section):
        raise UsageError(f"{setting.key}: {missing}")
    own = own_of(section)
    if own is not None:
        return Guarded(own, section, setting)
    return _BUILT_IN[section.kind](section, setting)


def own_of(section: PolicySection) -> Extension | None:
    """The user's class of a section, if it is one of a user's own."""
    return _OWN.get(type(section))


def absent(section: PolicySection) -> str:
    """What is said of a policy whose code does not run here; empty where it does."""
    if not isinstance(section, AbsentSection):
        return ""
    pins = {**(section.model_extra or {})}
    if "sha256" not in pins:
        return f"{section.kind} is of {pins['package']}, which is not installed here; install it"
    there = ", ".join(f"{code.path.name} {code.sha256}" for code in running_files())
    return (
        f"{section.kind} with SHA-256 {pins['sha256']} does not run here ({there or 'no file'} "
        "does); name the file with --code (a run keeps its own under policies/)"
    )


@cache
def _load_built_in() -> None:
    package = import_module("pretrain.decay.policies")
    for module in pkgutil.iter_modules(package.__path__):
        import_module(f"{package.__name__}.{module.name}")


@cache
def _own_section(own: Extension) -> type[PolicySection]:
    """The section of a policy of a user's own, with the key that pins its code."""
    _check_class(own)
    config: type[PolicySection] = own.found.Config
    key, value = own.pin
    fields: dict[str, Any] = {key: (str, value)}
    pinned = create_model(config.__name__, __base__=config, **fields)
    _OWN[pinned] = own
    return pinned


_SIGNATURES = {
    "__init__": 2, "move": 3, "due": 1, "observe": 2, "measures": 1, "figure": 2, "figures": 0,
    "state": 0, "restore": 1,
}  # fmt: skip
"""Methods of a policy, and how many arguments each is given beside ``self``."""


def _check_class(own: Extension) -> None:
    """
    Raises:
        ExtensionError: if the class is no policy.
    """
    found, kind = own.found, own.kind
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise ExtensionError(f"{kind} is no class derived from pretrain.decay.policy.Policy")
    if not (isinstance(found.Config, type) and issubclass(found.Config, PolicySection)):
        raise ExtensionError(f"{kind}.Config is no class derived from PolicySection")
    if found.wants not in (None, *get_args(Want)):
        raise ExtensionError(
            f"{kind}.wants is {found.wants!r}; it is None, {', '.join(get_args(Want))}"
        )
    needed = {"move": found.move} | ({"figure": found.figure} if found.wants == "weights" else {})
    for name, method in needed.items():
        if method is getattr(Policy, name):
            raise ExtensionError(f"{kind} has no method {name}")
    for name, count in _SIGNATURES.items():
        try:
            inspect.signature(getattr(found, name)).bind(*range(count + 1))
        except (TypeError, ValueError):
            wanted = ", ".join(inspect.signature(getattr(Policy, name)).parameters)
            raise ExtensionError(
                f"{kind}.{name} has another signature than {name}({wanted})"
            ) from None

"""Finds the two classes of a policy by its kind in a recipe: built in, or the user's own."""

from __future__ import annotations

from typing import get_args

from pretrain.config.extension import Extension, ExtensionError
from pretrain.config.kinds import Kinds
from pretrain.decay.guard import Guarded
from pretrain.decay.policy import Policy, PolicySection, Setting, Want
from pretrain.errors import UsageError


def _check(extension: Extension) -> None:
    """
    Raises:
        ExtensionError: if a user's class lacks a method that its ``wants`` needs.
    """
    cls = extension.cls
    if cls.wants not in (None, *get_args(Want)):
        raise ExtensionError(
            f"{extension.kind}.wants is {cls.wants!r}; it must be None, {', '.join(get_args(Want))}"
        )
    needed = {"move": cls.move} | ({"figure": cls.figure} if cls.wants == "weights" else {})
    for name, method in needed.items():
        if method is getattr(Policy, name):
            raise ExtensionError(f"{extension.kind} has no method {name}")


POLICIES: Kinds[PolicySection, Policy] = Kinds(
    "policy", "rankdecay.policies", "pretrain.decay.policies", PolicySection, Policy, _check
)
"""The policies that ``optimizer.weight_decay.policies`` can name."""


def make_policy(section: PolicySection, setting: Setting) -> Policy:
    """Make the policy of a section for a run.

    Raises:
        UsageError: if it does not fit the run, or its code is not loaded.
    """
    if missing := POLICIES.absent(section):
        raise UsageError(f"{setting.key}: {missing}")
    extension = POLICIES.own_of(section)
    if extension is not None:
        return Guarded(extension, section, setting)
    return POLICIES.class_of(section)(section, setting)

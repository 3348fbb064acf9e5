"""Weight decay by role: rules -> one λ for every parameter -> named optimizer groups.

Everything here is a function of the whole model's parameter list, never of what one pipeline
stage happens to hold, and parameters are matched by name, never by position.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from models.roles import ALIASES, MLP, QK, VO, ParameterInfo, Role
from pretrain.config.decay import DecayRule, WeightDecayConfig
from pretrain.decay.sites import KEY
from pretrain.errors import UsageError

_WIDER: dict[Role, tuple[str, ...]] = {
    **dict.fromkeys(QK, ("qk", "attention")),
    **dict.fromkeys(VO, ("vo", "attention")),
    **dict.fromkeys(MLP, ("mlp",)),
}
"""Words that include a role, most specific first, after the role's own name."""


@dataclass(frozen=True)
class DecayGroup:
    """Parameters of one role that share one λ."""

    name: str
    role: Role
    decay: float
    parameters: tuple[ParameterInfo, ...]

    @property
    def layers(self) -> str:
        """The blocks it covers, as ``0-3,7``; empty outside the blocks."""
        return compact({info.layer for info in self.parameters if info.layer is not None})

    @property
    def numel(self) -> int:
        """Number of elements."""
        return sum(info.numel for info in self.parameters)


@dataclass(frozen=True)
class DecayPlan:
    """λ of every parameter of the whole model."""

    groups: tuple[DecayGroup, ...]

    @cached_property
    def by_name(self) -> dict[str, float]:
        """λ by parameter name."""
        return {info.name: group.decay for group in self.groups for info in group.parameters}

    @cached_property
    def _by_group(self) -> dict[str, DecayGroup]:
        return {group.name: group for group in self.groups}

    def group(self, name: str) -> DecayGroup:
        """The group of that name."""
        return self._by_group[name]

    @cached_property
    def group_of(self) -> dict[str, str]:
        """Group name by parameter name."""
        return {info.name: group.name for group in self.groups for info in group.parameters}


def plan_decay(infos: Iterable[ParameterInfo], config: WeightDecayConfig) -> DecayPlan:
    """Assign λ to every parameter; each falls in exactly one group.

    Args:
        infos: every parameter of the whole model.

    Raises:
        UsageError: if a rule or a named role matches nothing in the whole model.
    """
    infos = list(infos)
    return _grouped(
        infos, {info.name: λ for info, λ in zip(infos, _assign(infos, config), strict=True)}
    )


def plan_from(infos: Iterable[ParameterInfo], decays: Mapping[str, float]) -> DecayPlan:
    """The plan with the given λ by parameter name (for example a checkpoint's)."""
    return _grouped(list(infos), decays)


def _assign(infos: list[ParameterInfo], config: WeightDecayConfig) -> list[float]:
    roles = {info.role for info in infos}
    for word in ALIASES:
        if getattr(config, word) is not None and not roles.intersection(ALIASES[word]):
            raise UsageError(
                f"{KEY}.{word}: this model has no such parameters; remove it (roles here: "
                f"{', '.join(sorted(roles))})"
            )
    hits = [0] * len(config.rules)
    tests = [_rule_test(rule, index) for index, rule in enumerate(config.rules)]
    _refuse_missing_layers(infos, config, tests)
    decays = []
    for info in infos:
        match = next((i for i, (r, ls) in enumerate(tests) if info.role in r and _in(info, ls)), -1)
        if match >= 0:
            hits[match] += 1
            decays.append(config.rules[match].decay)
        else:
            decays.append(_by_role(info.role, config))
    for index, count in enumerate(hits):
        if not count:
            rule = config.rules[index]
            raise UsageError(
                f"{KEY}.rules[{index}] (roles {', '.join(rule.roles)}; layers "
                f"{rule.layers or 'all'}) matches no parameter that an earlier rule leaves; "
                "correct or remove it"
            )
    return decays


def _refuse_missing_layers(
    infos: Sequence[ParameterInfo], config: WeightDecayConfig, tests: list[RuleTest]
) -> None:
    there = {info.layer for info in infos if info.layer is not None}
    for index, (_, layers) in enumerate(tests):
        if missing := (layers or set()) - there:
            raise UsageError(
                f"{KEY}.rules[{index}].layers: {config.rules[index].layers!r} has layer "
                f"{min(missing)}, but the layers of this model are {compact(there)}"
            )


def _by_role(role: Role, config: WeightDecayConfig) -> float:
    for word in (role.value, *_WIDER.get(role, ())):
        value = getattr(config, word)
        if value is not None:
            return float(value)
    return 0.0 if role in (Role.NORM, Role.BIAS) else config.default


RuleTest = tuple[set[Role], set[int] | None]
"""The roles and layers that a rule selects."""


def _rule_test(rule: DecayRule, index: int) -> RuleTest:
    roles: set[Role] = set()
    for word in rule.roles:
        roles.update(roles_of(word, f"{KEY}.rules[{index}].roles"))
    return roles, parse_layers(rule.layers, f"{KEY}.rules[{index}].layers")


def roles_of(word: str, key: str) -> tuple[Role, ...]:
    """The roles that a word of a recipe names.

    Raises:
        UsageError: naming the key, if the word is not a role.
    """
    if word not in ALIASES:
        close = difflib.get_close_matches(word, ALIASES, 1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"{key}: {word!r} is not a role; known: {', '.join(ALIASES)}{meant}")
    return ALIASES[word]


def _in(info: ParameterInfo, layers: set[int] | None) -> bool:
    return layers is None or info.layer in layers


def parse_layers(text: str, key: str) -> set[int] | None:
    """``"0-3,7"`` to {0, 1, 2, 3, 7}; empty to None (everywhere)."""
    if not text.strip():
        return None
    layers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        try:
            start, stop = int(first), int(last or first)
        except ValueError:
            raise UsageError(f'{key}: {text!r} is not a list of layers such as "0-3,7"') from None
        if stop < start:
            raise UsageError(f"{key}: {part.strip()!r} is backwards")
        layers.update(range(start, stop + 1))
    return layers


def compact(numbers: set[int]) -> str:
    """{0, 1, 2, 7} to ``0-2,7``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _grouped(infos: list[ParameterInfo], decays: Mapping[str, float]) -> DecayPlan:
    members: dict[tuple[Role, float], list[ParameterInfo]] = defaultdict(list)
    for info in infos:
        members[info.role, decays[info.name]].append(info)
    roles = [role for role, _ in members]
    groups = []
    for (role, decay), parameters in members.items():
        # One λ for the role: its plain name; several: distinguished by their layers.
        layers = compact({info.layer for info in parameters if info.layer is not None})
        name = role.value if roles.count(role) == 1 else f"{role.value}[{layers}]"
        groups.append(DecayGroup(name, role, decay, tuple(parameters)))
    order = list(Role)
    return DecayPlan(tuple(sorted(groups, key=lambda group: (order.index(group.role), group.name))))


@dataclass(frozen=True)
class DecayDifference:
    """A group of parameters whose λ differs between two plans."""

    role: Role
    layers: str
    before: float
    after: float


def compare(
    infos: Iterable[ParameterInfo], before: Mapping[str, float], after: Mapping[str, float]
) -> list[DecayDifference]:
    """Where two assignments differ, by role and layers."""
    changed: dict[tuple[Role, float, float], set[int]] = defaultdict(set)
    for info in infos:
        old, new = before.get(info.name, float("nan")), after[info.name]
        if old != new:
            changed[info.role, old, new].update([info.layer] if info.layer is not None else [])
    return [
        DecayDifference(role, compact(layers), old, new)
        for (role, old, new), layers in changed.items()
    ]

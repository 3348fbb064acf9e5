"""Weight decay by role for any model and optimizer: parameter groups, and what applies them.

λ always means decoupled decay: an update takes the share lr·λ of every weight, before the step. An
optimizer that says that it does so itself (``decoupled_weight_decay``, as AdamW does) gets λ as its
``weight_decay``. For every other one, and for fused matrices whose roles have several λ, a hook of
the optimizer's step does it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from models.live import LiveParameter, live_parameters, names_of
from pretrain.api.families import Described, described
from pretrain.api.slices import Rows, local_part, rows_of
from pretrain.config.decay import WeightDecayConfig
from pretrain.config.explain import explain
from pretrain.decay.plan import compact, plan_decay
from pretrain.decay.sites import DecayRecord, DecayRecords, label, site_of
from pretrain.errors import RunError, UsageError

_Optimizer = TypeVar("_Optimizer", bound=torch.optim.Optimizer)
_ONLY_OURS = ("coupling", "form", "policies", "adadecay_slope", "nuclear_every")
"""Keys of the recipe's section that need this program's own loop."""


@dataclass(frozen=True)
class _Planned:
    """A group as it was planned."""

    name: str
    members: tuple[LiveParameter, ...]
    decays: tuple[float, ...]
    """λ of each role of the group's matrices; one for a matrix of no role."""

    @property
    def is_sliced(self) -> bool:
        """Whether parts of its matrices have different λ."""
        return len(set(self.decays)) > 1


class DecayGroups(list[dict[str, Any]]):
    """Parameter groups for an optimizer, each with a ``name`` and its ``weight_decay``.

    ``optimizer = groups.attach(torch.optim.AdamW(groups, lr=1e-3))``
    """

    def __init__(self, model: nn.Module, planned: list[_Planned], words: WeightDecayConfig) -> None:
        self.words = words
        """The words of the recipe that made them."""
        self._planned = planned
        self._named = names_of(model)
        self._optimizer: torch.optim.Optimizer | None = None
        self._by_hook = [False] * len(planned)
        self._rows: dict[tuple[Any, ...], Rows] = {}
        super().__init__(
            {
                "params": [one.parameter for one in group.members],
                "name": group.name,
                "weight_decay": 0.0 if group.is_sliced else group.decays[0],
                "decays": list(group.decays),
                "exposure": [0.0] * len(group.decays),
                "retention": [1.0] * len(group.decays),
            }
            for group in planned
        )
        for group in planned:
            for one in group.members:
                _OWNERS[one.parameter] = self

    def attach(self, optimizer: _Optimizer) -> _Optimizer:
        """Take part in every step of an optimizer that was made of these groups; returns it.

        Raises:
            UsageError: if its parameters are not those of the groups, or it has no ``lr``.
        """
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        if self._optimizer is not None:
            raise UsageError("these groups have an optimizer already; make others for this one")
        self._optimizer = inner
        try:
            if any("lr" not in group for group, _ in self._ours()):
                raise UsageError(
                    f"{type(inner).__name__} has no lr, which λ is multiplied with; use another "
                    "optimizer"
                )
            self._by_hook = [
                plan.is_sliced or not _decays_itself(inner, group) for group, plan in self._ours()
            ]
            self.restore()
            self.audit()
        except UsageError:
            self._optimizer = None
            raise
        inner.register_step_pre_hook(lambda stepping, *_: self._before_step(stepping))
        return optimizer

    def _ours(self) -> list[tuple[dict[str, Any], _Planned]]:
        """The optimizer's groups beside the plan.

        Raises:
            UsageError: if they are not the same groups.
        """
        assert self._optimizer is not None
        groups = self._optimizer.param_groups
        if [group.get("name") for group in groups] != [plan.name for plan in self._planned]:
            raise UsageError(
                f"{type(self._optimizer).__name__} was not made of these groups alone; pass them "
                "as its parameters"
            )
        return list(zip(groups, self._planned, strict=True))

    def restore(self) -> None:
        """Set the planned λ again, after a state with other values was loaded."""
        for (group, plan), by_hook in zip(self._ours(), self._by_hook, strict=True):
            group["weight_decay"] = 0.0 if by_hook else plan.decays[0]
            group["decays"] = list(plan.decays)

    def audit(self) -> None:
        """Check that every trainable parameter is in exactly one group, under its λ.

        Raises:
            UsageError: naming a parameter that is missing, was replaced, or is there twice.
        """
        seen: dict[int, str] = {}
        for group, plan in (
            self._ours() if self._optimizer else zip(self, self._planned, strict=True)
        ):
            names = {id(one.parameter): one.name for one in plan.members}
            for parameter in group["params"]:
                name = names.get(id(parameter), "")
                if not name:
                    raise UsageError(f"{plan.name}: {_REPLACED}")
                if id(parameter) in seen:
                    raise UsageError(
                        f"{name}: is in two groups, {seen[id(parameter)]}, {plan.name}"
                    )
                seen[id(parameter)] = plan.name
        for name, parameter in self._named.items():
            if parameter.requires_grad and id(parameter) not in seen:
                raise UsageError(f"{name}: is in no group; make the groups after it is trainable")

    @property
    def decays(self) -> dict[str, float]:
        """λ of every parameter by name; ``NAME:query`` for a part of a fused matrix."""
        found: dict[str, float] = {}
        for plan in self._planned:
            for one in plan.members:
                names = [info.name for info in one.infos] or [one.name]
                found |= dict(zip(names, plan.decays, strict=True))
        return found

    def in_use(self) -> dict[str, float]:
        """λ by group, for a log; of a fused matrix, one for each role."""
        found: dict[str, float] = {}
        for plan in self._planned:
            roles, bracket, layers = plan.name.partition("[")
            for role, decay in zip(roles.split("+"), plan.decays, strict=True):
                found[f"{role}{bracket}{layers}"] = decay
        return found

    def books(self) -> DecayRecords:
        """The decay applied so far, by role and layer."""
        books: DecayRecords = {}
        groups = self._optimizer.param_groups if self._optimizer else self
        for group, plan in zip(groups, self._planned, strict=True):
            for one in plan.members:
                without, left = group.get(_PASSED_OVER, {}).get(one.name, ([], []))
                for index, info in enumerate(one.infos):
                    books[label(site_of(info))] = DecayRecord(
                        plan.decays[index],
                        float(group["exposure"][index]) - float(without[index] if without else 0),
                        float(group["retention"][index]) / float((left[index] if left else 1) or 1),
                    )
        return books

    def __str__(self) -> str:
        lines = []
        for plan in self._planned:
            count = sum(one.parameter.numel() for one in plan.members)
            decays = " / ".join(f"{decay:g}" for decay in plan.decays)
            lines.append(f"{plan.name}: λ = {decays}, {count:,} parameters")
        return "\n".join(lines)

    # --- inside the step ------------------------------------------------------------------------

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        skipped = getattr(optimizer, "found_inf", None)  # of torch.amp, for fused optimizers
        groups = zip(optimizer.param_groups, self._planned, self._by_hook, strict=True)
        for group, plan, by_hook in groups:
            _check_unchanged(group, plan, by_hook)
            if all(parameter.grad is None for parameter in group["params"]):
                continue
            rate = group["lr"] if skipped is None else group["lr"] * (1.0 - skipped)
            if by_hook:
                self._shrink(group, plan, rate)
            _count(group["exposure"], group["retention"], rate, plan.decays)
            for parameter, one in zip(group["params"], plan.members, strict=False):
                if parameter.grad is None:  # frozen since, or unused: nothing is applied to it
                    none = [0.0] * len(plan.decays), [1.0] * len(plan.decays)
                    without, left = group.setdefault(_PASSED_OVER, {}).setdefault(one.name, none)
                    _count(without, left, rate, plan.decays)
        for rows in self._rows.values():
            rows.forget()

    def _shrink(self, group: dict[str, Any], plan: _Planned, rate: Any) -> None:
        """w ← (1 − rate·λ)·w for the parameters that have a gradient, as the optimizers do."""
        decay = plan.decays[0]
        if not plan.is_sliced and not decay:
            return
        if len(group["params"]) != len(plan.members):
            raise RunError(f"{plan.name}: {_REPLACED}")
        whole = []
        for parameter, one in zip(group["params"], plan.members, strict=True):
            if parameter is not one.parameter:
                raise RunError(f"{plan.name}: {_REPLACED}")
            if parameter.grad is None:
                continue
            if plan.is_sliced:
                rows = self._rows_of(one, plan)
                local_part(parameter).mul_(rows.factor(rate))
            else:
                whole.append(local_part(parameter))
        if whole:
            torch._foreach_mul_(whole, 1.0 - rate * decay)

    def _rows_of(self, one: LiveParameter, plan: _Planned) -> Rows:
        """λ of each output of a fused matrix; layers of the same shape share it."""
        parameter = one.parameter
        key = (plan.name, tuple(parameter.shape), parameter.device, one.dim)
        if key not in self._rows:
            self._rows[key] = rows_of(one, plan.decays)
        return self._rows[key]


_PASSED_OVER = "passed_over"
"""Key of a group: by name of a parameter, exposure and retention of the updates that it missed."""


def _count(exposure: list[Any], retention: list[Any], rate: Any, decays: Sequence[float]) -> None:
    """Add the decay of one update to the sums of each role."""
    for index, decay in enumerate(decays):
        exposure[index] += rate * decay
        retention[index] *= 1.0 - rate * decay


_REPLACED = (
    "the optimizer has other parameters than those that decay_groups planned, as under DeepSpeed's "
    "ZeRO; wrap or shard the model first (DistributedDataParallel and fully_shard keep parameters)"
)
_FROZEN = "; {} frozen parameters (requires_grad is False) are in no group"
_OWNERS: Any = WeakTensorKeyDictionary()
"""The groups that a parameter belongs to."""


def _decays_itself(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether an optimizer of torch takes lr·weight_decay of every weight, and nothing else."""
    of_torch = type(optimizer).__module__.startswith("torch.optim.")
    return of_torch and bool(group.get("decoupled_weight_decay", False))


def _check_unchanged(group: dict[str, Any], plan: _Planned, by_hook: bool) -> None:
    """Refuse a λ that somebody changed, as a loaded optimizer's state does.

    Raises:
        RunError: naming the group and both values.
    """
    wanted = [0.0 if by_hook else plan.decays[0], list(plan.decays)]
    found = [group["weight_decay"], group.get("decays")]
    if found != wanted:
        theirs = found[1] if found[1] != wanted[1] else found[0]
        raise RunError(
            f"{plan.name}: the optimizer has λ {theirs}, but decay_groups planned {wanted[1]}; a "
            "loaded state brings its own: plan its values, or call groups.restore() after loading"
        )


def _refuse_unattached(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Refuse a step that would leave out a decay which only the hook applies."""
    for group in optimizer.param_groups:
        if "decays" not in group or not group["params"]:
            continue
        owner = _OWNERS.get(group["params"][0])
        if owner is not None and owner._optimizer is None:
            raise UsageError(
                f"{type(optimizer).__name__}: has groups of decay_groups but not their hook; write "
                "optimizer = groups.attach(optimizer)"
            )


register_optimizer_step_pre_hook(_refuse_unattached)


def decay_groups(
    model: nn.Module,
    decay: Mapping[str, Any] | WeightDecayConfig | None = None,
    *,
    family: Described = None,
    roles: Mapping[str, str | list[str]] | None = None,
    **words: Any,
) -> DecayGroups:
    """Parameter groups with weight decay by role, for any optimizer of torch.

    Args:
        model: after it was wrapped or sharded (DistributedDataParallel, ``fully_shard``).
        decay: the words of the recipe's section ``optimizer.weight_decay``; they can also be given
            as keywords: ``default=0.1, attention=0.3, mlp=0.0, rules=[...]``.
        family: where the model's matrices are: a mapping with the keys of models/families.yaml, a
            YAML file of it, or the name of a known family. Default: its config's ``model_type``.
        roles: tensor names of further matrices, by role, such as ``{"head": "score.weight"}``.

    Returns:
        The groups, a list of dictionaries; `DecayGroups.attach` completes it.

    Raises:
        UsageError: naming a word that is not known, or a rule that matches no parameter.
        ModelError: naming a matrix that has no role.
    """
    config = _section(decay, words)
    members = live_parameters(model, described(family, model), roles)
    if not members:
        raise UsageError(
            f"{type(model).__name__}: every parameter is frozen (requires_grad is False), so there "
            "is none for an optimizer"
        )
    infos = [info for one in members for info in one.infos]
    try:
        by_name = plan_decay(infos, config).by_name
    except UsageError as error:
        frozen = sum(not parameter.requires_grad for parameter in names_of(model).values())
        raise UsageError(f"{error}{_FROZEN.format(frozen) if frozen else ''}") from None
    return DecayGroups(model, _grouped(members, by_name, config.default), config)


def _section(
    decay: Mapping[str, Any] | WeightDecayConfig | None, words: dict[str, Any]
) -> WeightDecayConfig:
    if isinstance(decay, WeightDecayConfig):
        decay = decay.model_dump(exclude_unset=True)
    values = {**(decay or {}), **words}
    for key in _ONLY_OURS:
        if key in values and values[key] != WeightDecayConfig.model_fields[key].default:
            raise UsageError(
                f"{key}: works only in this program's own training (pretrain train); remove it"
            )
    try:
        return WeightDecayConfig.model_validate(values)
    except ValidationError as error:
        problem = explain(error.errors()[0], WeightDecayConfig)
        raise UsageError(f"decay_groups: {problem}") from None


def _grouped(
    members: list[LiveParameter], by_name: Mapping[str, float], default: float
) -> list[_Planned]:
    """One group for each role and λ; a fused matrix has as many λ as roles."""
    sorted_: dict[tuple[str, tuple[float, ...]], list[LiveParameter]] = {}
    for one in members:
        decays = tuple(by_name[info.name] for info in one.infos) or (default,)
        sorted_.setdefault((one.roles, decays), []).append(one)
    roles = [key[0] for key in sorted_]
    planned = []
    for (role, decays), part in sorted_.items():
        layers = {info.layer for one in part for info in one.infos if info.layer is not None}
        name = role if roles.count(role) == 1 else f"{role}[{compact(layers)}]"
        planned.append(_Planned(name, tuple(part), decays))
    return planned

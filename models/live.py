"""Models in memory: where their attention is, and the role of each of their parameters.

A model of the user's own loop has no declared roles (`models.roles`). Its family says where its
matrices are, by the same names as in its files (`models.families`), so that the same code reads
both. A fused matrix has several roles, each in some of its rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.factors import AttentionShape
from models.families import Family, Tower, known_families
from models.huggingface import AttentionTower, attention_towers, parts_of
from models.roles import ModelError, ParameterInfo, Role

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
"""Parts of names that torch's wrappers of modules add."""
NO_ROLE = "default"
"""The word for matrices that have none of our roles; they get the decay of that name."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel, torch.compile or an engine."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and len(model._modules) == 1:
            inner = model._modules.get("module")
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def names_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by the names of the bare model; a tied one once."""
    named = {}
    for name, parameter in unwrapped(model).named_parameters():
        for part in _WRAPPERS:
            name = name.replace(part, "")  # noqa: PLW2901 - one name after the other
        named[name] = parameter
    return named


class LiveTensors:
    """The parameters of a model in memory, read like the tensors of a file.

    A sharded one (DTensor) is gathered, so every process must read the same names in one order.
    """

    def __init__(self, model: nn.Module) -> None:
        self.folder = type(unwrapped(model)).__name__.removeprefix("FSDP")
        self._parameters = names_of(model)
        self.is_sharded = any(map(is_sharded, self._parameters.values()))

    @property
    def names(self) -> list[str]:
        """Every parameter's name."""
        return sorted(self._parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a whole parameter."""
        return tuple(self._parameters[name].shape)

    def read(self, name: str) -> Tensor:
        """A whole parameter; a collective call if it is sharded."""
        parameter = self._parameters[name].detach()
        if is_sharded(parameter):
            whole: Tensor = parameter.full_tensor()  # type: ignore[attr-defined]
            return whole
        return parameter

    def close(self) -> None:
        """Nothing is open."""


def is_sharded(parameter: Tensor) -> bool:
    """Whether it is a DTensor, of which this process may hold only a part."""
    return hasattr(parameter, "full_tensor")


def config_of(model: nn.Module) -> dict[str, Any]:
    """The values that the model's ``config`` has; empty if it has none."""
    config: Any = getattr(unwrapped(model), "config", None)
    if hasattr(config, "to_dict"):
        values: dict[str, Any] = config.to_dict()
        return values
    return dict(config) if isinstance(config, Mapping) else dict(getattr(config, "__dict__", {}))


def live_towers(model: nn.Module, family: Family | None = None) -> list[AttentionTower]:
    """The attention towers of a model in memory; weights that are not finite give NaN.

    Args:
        family: where its attention is; default: the family of its config's ``model_type``.

    Raises:
        ModelError: naming what was not found, and for an unknown family how to describe it.
    """
    family, files = family_of_model(model, family), LiveTensors(model)
    try:
        found = attention_towers(config_of(model), files, family, lambda text: None)
    except ModelError as error:
        raise ModelError(_in_python(str(error))) from None
    return [
        AttentionTower(one.name, one.shape, one.files, one.tower, one.rotates, finite=False)
        for one in found
    ]


def _in_python(message: str) -> str:
    """A message that names options of the command line, for a caller in Python."""
    for words, ours in (
        ("--allow-unused leaves it out, ", ""),
        ("in a YAML file for --family", "with family="),
        ("a --family file", "family="),
        ("--family", "family="),
        ("config.json", "the model's config"),
    ):
        message = message.replace(words, ours)
    return message


def family_of_model(model: nn.Module, family: Family | None) -> Family | None:
    """A family by the names that its class has in memory; None if it is not known."""
    if family is None:
        family = known_families().get(str(config_of(model).get("model_type", "")))
    if family is None:
        return None
    files = LiveTensors(model)
    towers = {
        name: tower.in_memory if tower.live and parts_of(files, tower.in_memory) else tower
        for name, tower in family.towers.items()
    }
    return family.model_copy(update={"towers": towers})


@dataclass(frozen=True)
class LiveParameter:
    """A parameter of a model in memory, with its role, or with one role for each of its rows."""

    name: str
    parameter: nn.Parameter
    infos: tuple[ParameterInfo, ...]
    """One for each role; none for a matrix that gets the default decay."""
    part: Tensor | None = None
    """For a fused matrix, the index in ``infos`` for each output dimension."""
    dim: int = 0
    """The dimension of outputs."""

    @property
    def roles(self) -> str:
        """``query``, or ``query+key+value`` for a fused matrix."""
        return "+".join(info.role.value for info in self.infos) or NO_ROLE


def live_parameters(
    model: nn.Module,
    family: Family | None = None,
    roles: Mapping[str, str | list[str]] | None = None,
    strict: bool = True,
    frozen: bool = False,
) -> list[LiveParameter]:
    """Every trainable parameter of a model with its role; each is in the list once.

    Args:
        family: where its attention is; default: the family of its config's ``model_type``.
        roles: tensor names of further matrices, by role, before those of the family. A name may
            contain ``{layer}``, and any prefix before it is accepted.
        strict: refuse a matrix that has no role; otherwise it is one of the default decay.
        frozen: list those that are not trained (``requires_grad`` is False) as well.

    Raises:
        ModelError: naming a matrix that has no role, and how to give it one.
    """
    towers = live_towers(model, family)
    family = family_of_model(model, family)
    files = LiveTensors(model)
    fused_or_single: dict[str, LiveParameter] = {}
    parameters = names_of(model)
    for tower in towers:
        for one in _attention(tower, files, parameters):
            fused_or_single[one.name] = one
    transposed = any(tower.tower.transposed for tower in towers)
    patterns = [*_patterns(roles or {}), *_patterns(family.roles if family else {})]
    found, unknown = [], []
    for name, parameter in parameters.items():
        if not parameter.requires_grad and not frozen:
            continue
        known = fused_or_single.get(name) or _by_name(name, parameter, patterns, transposed)
        found.append(known or LiveParameter(name, parameter, ()))
        unknown += [] if known else [name]
    if unknown and strict:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise ModelError(
            f"{files.folder}: {unknown[0]}{more} has no role; name it, such as "
            f"roles={{'mlp_in': '{_general(unknown[0])}'}}, or '{NO_ROLE}' for the default decay"
        )
    return found


def _general(name: str) -> str:
    """A name with {layer} for its first number."""
    return re.sub(r"\.\d+\.", ".{layer}.", name, count=1)


def _attention(
    tower: AttentionTower, files: LiveTensors, parameters: Mapping[str, nn.Parameter]
) -> Iterator[LiveParameter]:
    """The matrices of a tower's attention."""
    where = tower.tower
    for layer, parts in parts_of(files, where).items():
        needed = [where.qkv] if where.qkv else [where.query, where.key, where.value]
        for part in (*needed, where.output):
            if part not in parts:
                name = where.layer.format(layer=layer) + part
                raise ModelError(f"{files.folder}: has no {name}; correct the family's description")
        if where.qkv:
            yield _fused_attention(tower.shape, where, parts[where.qkv], layer, parameters)
        for part, role in (
            (where.query, Role.QUERY),
            (where.key, Role.KEY),
            (where.value, Role.VALUE),
            (where.output, Role.ATTENTION_OUTPUT),
        ):
            if part and not (where.qkv and role is not Role.ATTENTION_OUTPUT):
                yield _single(parts[part], parameters[parts[part]], role, layer)


def _fused_attention(
    shape: AttentionShape,
    tower: Tower,
    name: str,
    layer: int,
    parameters: Mapping[str, nn.Parameter],
) -> LiveParameter:
    head, group, units = shape.head_size, shape.group, shape.key_value_heads
    sizes, times = [group * head, head, head], units
    if tower.order == "stacked":
        sizes, times = [size * units for size in sizes], 1
    part = torch.arange(3).repeat_interleave(torch.tensor(sizes)).repeat(times)
    roles = (Role.QUERY, Role.KEY, Role.VALUE)
    return _fused(name, parameters[name], roles, layer, part, 1 if tower.transposed else 0)


def _single(name: str, parameter: nn.Parameter, role: Role, layer: int | None) -> LiveParameter:
    info = ParameterInfo(name, role, layer, tuple(parameter.shape), None)
    return LiveParameter(name, parameter, (info,))


def _fused(
    name: str,
    parameter: nn.Parameter,
    roles: tuple[Role, ...],
    layer: int | None,
    part: Tensor,
    dim: int,
) -> LiveParameter:
    infos = []
    for index, role in enumerate(roles):
        shape = list(parameter.shape)
        shape[dim] = int((part == index).sum())
        infos.append(ParameterInfo(f"{name}:{role.value}", role, layer, tuple(shape), None))
    return LiveParameter(name, parameter, tuple(infos), part, dim)


Pattern = tuple[re.Pattern[str], tuple[Role, ...]]


def _patterns(roles: Mapping[str, str | list[str]]) -> list[Pattern]:
    """The expressions of names, with their roles.

    Raises:
        ModelError: if a word is not a role.
    """
    patterns: list[Pattern] = []
    for words, names in roles.items():
        try:
            named = () if words == NO_ROLE else tuple(Role(word) for word in words.split("+"))
        except ValueError:
            known = ", ".join([*(role.value for role in Role), NO_ROLE])
            raise ModelError(f"roles: {words!r} is not a role; known: {known}") from None
        for name in [names] if isinstance(names, str) else names:
            tail = re.escape(name).replace(re.escape("{layer}"), r"(?P<layer>\d+)")
            patterns.append((re.compile(rf"(?:.*\.)?{tail}"), named))
    return patterns


def _by_name(
    name: str, parameter: nn.Parameter, patterns: list[Pattern], transposed: bool
) -> LiveParameter | None:
    """The parameter with the role of its name, or of its shape; None if it has none."""
    for pattern, roles in patterns:
        if match := pattern.fullmatch(name):
            place = match.groupdict().get("layer")
            layer = int(place) if place is not None else None
            if not roles:
                return LiveParameter(name, parameter, ())
            if len(roles) == 1:
                return _single(name, parameter, roles[0], layer)
            return _halves(name, parameter, roles, layer, transposed)
    if parameter.dim() < 2:
        layers = re.search(r"\.(\d+)\.", name)
        role = Role.BIAS if name.rpartition(".")[2].endswith("bias") else Role.NORM
        return _single(name, parameter, role, int(layers[1]) if layers else None)
    return None


def _halves(
    name: str,
    parameter: nn.Parameter,
    roles: tuple[Role, ...],
    layer: int | None,
    transposed: bool,
) -> LiveParameter:
    """A matrix with equal parts, one after the other; experts come before both dimensions."""
    dim = parameter.dim() - (1 if transposed else 2)
    rows = parameter.shape[dim]
    if rows % len(roles):
        raise ModelError(f"{name}: {rows} rows are not {len(roles)} equal parts")
    part = torch.arange(len(roles)).repeat_interleave(rows // len(roles))
    return _fused(name, parameter, roles, layer, part, dim)

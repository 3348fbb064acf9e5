"""The decay that an optimizer applies by itself, recorded by role and layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from models.families import Family
from models.live import live_parameters
from models.roles import Role
from pretrain.config.decay import WeightDecayConfig
from pretrain.decay.sites import DecayRecord, DecayRecords, Site, label, site_of


class WatchedDecay:
    """λ, exposure and retention of a torch optimizer whose decay is decoupled (AdamW).

    The decay of other optimizers is not known: then λ is what they say, and the sums are NaN.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        family: Family,
    ) -> None:
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        sites: dict[int, list[Site]] = {
            id(one.parameter): [site_of(info) for info in one.infos]
            for one in live_parameters(model, family, strict=False, frozen=True)
        }
        self._optimizer = inner
        self._sites: list[list[tuple[Tensor, Site]]] = [
            [
                (parameter, site)
                for parameter in group["params"]
                for site in sites.get(id(parameter), [])
            ]
            for group in inner.param_groups
        ]
        self._sums: dict[Site, tuple[float, float]] = {
            site: (0.0, 1.0) for group in self._sites for _, site in group
        }
        inner.register_step_pre_hook(lambda *_: self._count())

    def _groups(self) -> list[tuple[dict[str, Any], list[tuple[Tensor, Site]]]]:
        return list(zip(self._optimizer.param_groups, self._sites, strict=True))

    def _count(self) -> None:
        for group, sites in self._groups():
            known = group.get("decoupled_weight_decay", False) or not group.get("weight_decay")
            shrink = group["lr"] * group.get("weight_decay", 0.0) if known else math.nan
            # An optimizer passes over a parameter without a gradient, and so does its decay.
            for site in {site for parameter, site in sites if parameter.grad is not None}:
                exposure, retention = self._sums[site]
                self._sums[site] = exposure + shrink, retention * (1.0 - shrink)

    def books(self) -> DecayRecords:
        """The decay applied so far, by role and layer."""
        return {
            label(site): DecayRecord(
                float(group.get("weight_decay", 0.0)), *map(float, self._sums[site])
            )
            for group, sites in self._groups()
            for _, site in sites
        }

    def in_use(self) -> dict[str, float]:
        """λ by role; the largest, if its parameters have several."""
        found: dict[str, float] = {}
        for group, sites in self._groups():
            for parameter, (role, _) in sites:
                if not parameter.requires_grad:
                    continue
                decay = float(group.get("weight_decay", 0.0))
                found[role.value] = max(decay, found.get(role.value, 0.0))
        return found

    @property
    def _form(self) -> dict[str, str]:
        """The direction of the decay, where it is not along the weight itself."""
        groups = [group for group in self._optimizer.param_groups if group.get("weight_decay")]
        of_torch = type(self._optimizer).__module__.startswith("torch.optim.")
        decoupled = any(group.get("decoupled_weight_decay", False) for group in groups)
        return {"form": "l2"} if of_torch and groups and not decoupled else {}

    @property
    def words(self) -> WeightDecayConfig:
        """The λ of each role in the words of a recipe."""
        found = self.in_use()
        matrices = {name: found[name] for name in found if name not in (Role.NORM, Role.BIAS)}
        values = list(matrices.values())
        usual = max(set(values), key=values.count) if values else 0.0
        others = {name: decay for name, decay in found.items() if decay != usual}
        vectors = (Role.NORM.value, Role.BIAS.value)
        others = {
            name: decay
            for name, decay in {**others, **{v: found[v] for v in vectors if v in found}}.items()
            if not (name in vectors and decay == 0.0)
        }
        return WeightDecayConfig.model_validate({"default": usual, **others, **self._form})


def books_without_optimizer(model: nn.Module, family: Family | None) -> DecayRecords:
    """The decay of every site that no known optimizer trains: none if it is frozen, else NaN."""
    books: DecayRecords = {}
    for one in live_parameters(model, family, strict=False, frozen=True):
        trained = one.parameter.requires_grad
        record = (
            DecayRecord(*[math.nan] * 3) if trained else DecayRecord(0.0, 0.0, 1.0, frozen=True)
        )
        books |= {label(site_of(info)): record for info in one.infos}
    return books

"""The sites that have their own λ, and the decay of an update there."""

from __future__ import annotations

from dataclasses import dataclass, field

from models.roles import ParameterInfo, Role

KEY = "optimizer.weight_decay"
"""The section of a recipe about weight decay."""
Site = tuple[Role, int | None]
"""A role in a block (None: outside the blocks): the smallest unit that has its own λ."""


@dataclass(frozen=True)
class DecayRecord:
    """The decay applied at a site so far."""

    decay: float
    """λ of the last update."""
    exposure: float
    """Σ rate·λ over the updates so far."""
    retention: float
    """∏ (1 − rate·λ): the share that would be left of a weight if nothing else changed it."""
    frozen: bool = field(default=False, kw_only=True)
    """Whether its matrix is not trained, as a part of a model in somebody else's loop can be."""


DecayRecords = dict[str, DecayRecord]
"""The applied decay by site label."""


@dataclass(frozen=True)
class Applied:
    """The decay of one update at a site: w ← w − times·rate·λ·direction."""

    decay: float
    rate: float
    times: int = 1
    """Number of updates for which this one counts: with ``nuclear_every`` n, it is n in every n-th
    update and 0 in the others."""

    @property
    def shrink(self) -> float:
        """times·rate·λ: the share that is removed."""
        return self.times * (self.decay * self.rate)


def site_of(info: ParameterInfo) -> Site:
    """The site of a parameter."""
    return info.role, info.layer


def label(site: Site) -> str:
    """``query[3]``, or ``head`` outside the blocks."""
    role, layer = site
    return role.value if layer is None else f"{role.value}[{layer}]"


def coupled_rate(coupling: str, rate: float, peak: float) -> float:
    """The rate that multiplies λ in an update.

    Args:
        coupling: ``lr``: η; ``lr2``: η²/η_peak; ``none``: 1.
        rate: η of the update.
        peak: the largest η of the recipe.
    """
    if coupling == "none":
        return 1.0
    if coupling == "lr2":
        return rate * rate / peak if peak else 0.0
    return rate

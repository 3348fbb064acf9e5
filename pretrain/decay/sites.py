"""The places that have a λ of their own, and what an update takes there."""

from __future__ import annotations

from dataclasses import dataclass

from models.roles import ParameterInfo, Role

KEY = "optimizer.weight_decay"
"""The section of a recipe that says how weights decay."""
Site = tuple[Role, int | None]
"""A role in a block (None: outside the blocks): the finest place that has a λ of its own."""


@dataclass(frozen=True)
class DecayRecord:
    """What decay has done at a site."""

    decay: float
    """λ of the last update."""
    exposure: float
    """Σ rate·λ over the updates so far."""
    retention: float
    """∏ (1 − rate·λ): what would be left of a weight that nothing else moves."""


DecayRecords = dict[str, DecayRecord]
"""By site label."""


@dataclass(frozen=True)
class Applied:
    """What one update does at a site: w ← w − times·rate·λ·direction."""

    decay: float
    rate: float
    times: int = 1
    """Updates that this one stands for: with ``nuclear_every`` n it is n in every n-th update,
    else 0."""

    @property
    def shrink(self) -> float:
        """times·rate·λ: what is taken."""
        return self.times * (self.decay * self.rate)


def site_of(info: ParameterInfo) -> Site:
    """Where a parameter belongs."""
    return info.role, info.layer


def label(site: Site) -> str:
    """``query[3]``, or ``head`` outside the blocks."""
    role, layer = site
    return role.value if layer is None else f"{role.value}[{layer}]"


def coupled_rate(coupling: str, rate: float, peak: float) -> float:
    """The rate that λ is multiplied by in an update.

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

"""The interface of a decay policy: its keys in a recipe, its inputs, how it changes λ, its state.

A policy is one file with two classes: a `PolicySection` (its keys, with bounds and defaults) and a
`Policy`. The built-in ones are in `pretrain.decay.policies`; docs/extending.md explains how a
user's file or an installed package adds another. Nothing here depends on the whole recipe, on
processes or on DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from models.config import GPTConfig
from models.roles import ParameterInfo, Role
from pretrain.config.kinds import KindSection
from pretrain.decay.sites import Site

Want = Literal["ranks", "weights", "norms"]
"""What a policy can request: rows of the rank table, a figure of each matrix, or ‖∇‖₂/‖w‖₂ of the
whole model."""


class PolicySection(KindSection):
    """An entry of ``optimizer.weight_decay.policies``; subclasses add keys of their own."""

    roles: list[str] = Field(min_length=1, description="matrices whose λ it sets")

    def lengths(self) -> dict[str, float]:
        """The keys that are a share of the run (below 1) or a number of steps."""
        return {}

    def check_lengths(self, key: str, steps: int) -> None:
        """Refuse lengths that no run can have.

        Args:
            key: the section's key in the recipe, for the message.

        Raises:
            UsageError: naming the key and what to do.
        """

    def length_remarks(self, key: str, steps: int) -> Iterator[str]:
        """One line for each setting that has no effect in a run of this number of steps."""
        yield from ()


@dataclass(frozen=True)
class Setting:
    """The information about the run for a policy; it is the same on every process."""

    key: str
    """The policy's key in the recipe, for messages."""
    roles: frozenset[Role]
    """The roles whose λ it changes."""
    parameters: tuple[ParameterInfo, ...]
    """The parameters of these roles, of the whole model."""
    base: Mapping[Site, float]
    """λ of the recipe at every site of these roles."""
    steps: int
    """Number of updates of the run."""
    coupling: Mapping[Role, str]
    """``lr``, ``lr2`` or ``none``, by role."""
    rate: Callable[[Role, int], float]
    """The rate that multiplies λ of a role in update number ``step`` (the first is 0)."""
    model: GPTConfig
    threshold: float
    """Share of Σσ that the pseudo-rank covers."""
    full_rank: float
    """Pseudo-rank of a head of full rank: 1, or head width / model width."""

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return self.model.num_layers


class Policy:
    """Changes λ at the sites of its roles.

    A policy may depend only on its section, its `Setting`, the step and its observations: every
    process has a copy, and all copies must give the same λ.
    """

    Config: ClassVar[type[PolicySection]] = PolicySection
    """Its keys in a recipe."""
    wants: Want | None = None
    """The kind of measurement that `observe` gets; None: λ is a function of the step."""
    per_layer: bool = True
    """Whether λ can differ between the layers of a role; the log then has it by layer."""
    every: int = 1
    """Steps between observations of ranks or weights."""
    log_kind: str = "policy"
    """Kind of the metrics lines with its `figures`."""
    form: str | None = None
    """The direction of decay that it needs for its roles (``optimizer.weight_decay.form``)."""

    def __init__(self, config: Any, setting: Setting) -> None:
        """
        Args:
            config: its section of the recipe, an instance of `Config`.
            setting: the run.

        Raises:
            UsageError: if the section does not fit the run.
        """
        self.config, self.setting, self.roles = config, setting, setting.roles

    def move(self, site: Site, decay: float, step: int) -> float:
        """λ in update number ``step`` (the first is 0), from the λ so far.

        It is called several times per update and must not change the policy.
        """
        raise NotImplementedError

    # --- what it measures -----------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Whether it observes ranks after, or weights before, update number ``step``."""
        return step % self.every == 0

    def observe(self, measured: Any, step: int) -> list[str]:
        """Process a measurement.

        Args:
            measured: by `wants`. ``ranks``: rows of the rank table, after ``step`` updates.
                ``weights``: `figure` of each matrix by site label (``query[3]``), before the update
                number ``step``. ``norms``: ‖∇‖₂/‖w‖₂ in that update, before clipping.

        Returns:
            Messages for the user, one line each; for ``norms`` they are not shown.
        """
        return []

    def measures(self, info: ParameterInfo) -> bool:
        """Whether `figure` is needed for a parameter, if `wants` is ``weights``."""
        return len(info.shape) == 2 and info.role in self.roles

    def figure(self, info: ParameterInfo, matrix: Tensor) -> float:
        """A figure of a whole matrix, in fp32, on the device; one process computes it."""
        raise NotImplementedError

    def figures(self) -> dict[str, Any]:
        """The values that are logged after an observation of weights; nothing if empty."""
        return {}

    # --- saved with the run ---------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The state that a resumed run needs, as JSON."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a saved state."""

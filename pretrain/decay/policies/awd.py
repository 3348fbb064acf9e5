"""AWD (Ghiasi et al. 2023): decay in proportion to ‖∇‖/‖w‖."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field

from pretrain.decay.policy import Policy, PolicySection, Setting
from pretrain.decay.registry import POLICIES
from pretrain.decay.sites import Site


class AdaptiveDecay(PolicySection):
    """AWD (Ghiasi et al. 2023): λ·‖∇‖/‖w‖ of the whole model, smoothed, as L2 in the gradient."""

    roles: list[str] = Field(["attention", "mlp"], description="matrices whose λ it sets")
    memory: float = Field(0.1, ge=0, lt=1, description="share of the running mean that is kept")
    form: Literal["l2", "decoupled"] = Field(
        "l2", description="l2: as in the paper; decoupled: as weight_decay.form"
    )


@POLICIES.built_in("awd")
class Adaptive(Policy):
    """AWD (Ghiasi et al. 2023): λ_t = λ‖∇‖₂/‖w‖₂ of the whole model, λ̄ ← m·λ̄ + (1−m)·λ_t."""

    Config = AdaptiveDecay
    wants = "norms"
    config: AdaptiveDecay
    per_layer = False

    def __init__(self, config: AdaptiveDecay, setting: Setting) -> None:
        super().__init__(config, setting)
        self.form = config.form
        self.mean = 0.0
        self._began = False

    def observe(self, measured: float, step: int) -> list[str]:
        """Add ‖∇‖₂/‖w‖₂ of this update to the mean, with the unscaled gradient before clipping.

        A ratio that is not finite would stay in the mean for ever and is left out.
        """
        if math.isfinite(measured):
            self.mean = self.config.memory * self.mean + (1.0 - self.config.memory) * measured
            self._began = True
        return []

    def move(self, site: Site, decay: float, step: int) -> float:
        return decay * self.mean if self._began else decay

    def state(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def restore(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]
        self._began = self.mean > 0

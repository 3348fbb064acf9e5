"""Weights & Biases: online if an account is configured, else offline in ``RUN/wandb``."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from pydantic import Field

from pretrain.runs.service import (
    SERVICES,
    Map,
    Service,
    ServiceSection,
    TrackedRun,
    coloured,
)

_STEP = "step"
"""Axis of all charts: the number of updates."""


class WandbSection(ServiceSection):
    """A run of W&B."""

    project: str = Field(min_length=1, description="the project's name")
    group: str = Field("", description="for example the sweep's name")


@SERVICES.built_in("wandb")
class Wandb(Service):
    """One run of W&B for a run folder, also after restarts."""

    Config = WandbSection
    name = "W&B"
    needs = ("wandb", "wandb")
    config: WandbSection

    def __init__(self, config: WandbSection, run: TrackedRun) -> None:
        super().__init__(config, run)
        import wandb

        self._image = wandb.Image
        identity = run.folder / "wandb-id"
        if not identity.exists():
            identity.write_text(secrets.token_hex(4))
        has_key = "WANDB_API_KEY" in os.environ or (Path.home() / ".netrc").exists()
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
        self._run = wandb.init(
            project=config.project,
            name=run.folder.name,
            group=config.group or None,
            id=identity.read_text(),
            dir=str(run.folder),
            resume="allow",
            mode=mode,
            config=run.recipe,
            settings=wandb.Settings(silent=True, init_timeout=30),
        )
        # W&B's own step may not fall, but a measurement may be finished after later updates.
        self._run.define_metric(_STEP)
        self._run.define_metric("*", step_metric=_STEP, step_sync=True)

        self._sent: dict[str, int] = {}

    def log(self, numbers: dict[str, float], step: int) -> None:
        # After a return to a checkpoint, W&B keeps what it has: it cannot delete a point.
        new = {name: value for name, value in numbers.items() if self._sent.get(name, -1) < step}
        self._sent |= dict.fromkeys(new, step)
        if new:
            self._run.log({**new, _STEP: step})

    def show(self, maps: dict[str, Map], step: int) -> None:
        caption = (
            f"step {step}: layers from top to bottom, heads from left to right; dark is 0, light "
            "is 1"
        )
        images = {name: self._image(coloured(values), caption=caption)
                  for name, values in maps.items()}  # fmt: skip
        self._run.log({**images, _STEP: step})

    def close(self) -> None:
        self._run.finish()  # suppress its messages about settings

"""TensorBoard: event files in ``RUN/tensorboard``."""

from __future__ import annotations

from typing import Any

from pretrain.runs.service import (
    SERVICES,
    Map,
    Service,
    ServiceSection,
    TrackedRun,
    coloured,
)


@SERVICES.built_in("tensorboard")
class TensorBoard(Service):
    """Scalars by step; values of later steps are hidden when a run goes back."""

    name = "TensorBoard"
    needs = ("torch.utils.tensorboard", "tensorboard")

    def __init__(self, config: ServiceSection, run: TrackedRun) -> None:
        super().__init__(config, run)
        self._writer = self._open(run.first)

    def _open(self, step: int) -> Any:
        """A writer for values after ``step``."""
        from torch.utils.tensorboard import SummaryWriter

        # A start from the beginning hides all values of an earlier one.
        folder = str(self.run.folder / "tensorboard")
        return SummaryWriter(folder, purge_step=step + 1 if step else 0)

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def show(self, maps: dict[str, Map], step: int) -> None:
        for name, values in maps.items():
            self._writer.add_image(name, coloured(values), step, dataformats="HWC")

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._writer = self._open(step)

    def close(self) -> None:
        self._writer.close()

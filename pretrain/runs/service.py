"""Services that receive metrics in addition to ``metrics.jsonl``: W&B, TensorBoard, or the
user's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pretrain.config.extension import Extension, ExtensionError
from pretrain.config.kinds import Kinds, KindSection

Map = list[list[float]]
"""Values from 0 to 1, or NaN: a row for each layer, a column for each head."""
_PIXELS = 16
"""Height and width of a cell of a map."""


def coloured(values: Map) -> Any:
    """A map as an image, uint8 ``[height, width, 3]``: dark is 0, light is 1, grey is NaN."""
    import numpy as np
    from matplotlib import colormaps

    colours = colormaps["viridis"].with_extremes(bad="grey")(np.ma.masked_invalid(values))
    cells = (255 * colours[..., :3]).round().astype("uint8")
    return cells.repeat(_PIXELS, axis=0).repeat(_PIXELS, axis=1)


class ServiceSection(KindSection):
    """An entry of ``logging.trackers``; subclasses add keys of their own."""


@dataclass(frozen=True)
class TrackedRun:
    """The run whose metrics a service receives."""

    folder: Path
    first: int
    """The step that training continues from; what was logged after it is outdated."""
    recipe: dict[str, Any]
    """The whole recipe as plain data, without secrets."""


class Service:
    """Receives metrics on process rank 0. An exception stops the service, never the run.

    Its constructor may also raise: the run then continues without it.
    """

    Config: ClassVar[type[ServiceSection]] = ServiceSection
    """Its keys in a recipe."""
    name: str = ""
    """Its name in messages; empty: its kind."""
    needs: ClassVar[tuple[str, str]] = ("", "")
    """A module that must be there, and the package to install for it; empty: none."""

    def __init__(self, config: Any, run: TrackedRun) -> None:
        """
        Args:
            config: its section of the recipe, an instance of `Config`.
            run: the run.
        """
        self.config, self.run = config, run

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Receive the numbers of one line, by name: ``train/loss``, ``evaluation/loss``, ...

        Figures of a group have the group's name: ``weight_decay/query``,
        ``rank_by_layer/qk_layer_00``. Sorted names are in order of layers.
        """
        raise NotImplementedError

    def show(self, maps: dict[str, Map], step: int) -> None:
        """Receive maps of a measurement, by name: ``rank_by_head/W_QK``; not shown by default."""

    def rewind(self, step: int) -> None:
        """Discard what was logged after a step, because the run goes back there."""

    def close(self) -> None:
        """Finish at the end of the run: write everything that is left."""


def _check(extension: Extension) -> None:
    if extension.cls.log is Service.log:
        raise ExtensionError(f"{extension.kind} has no method log")


SERVICES: Kinds[ServiceSection, Service] = Kinds(
    "tracker", "rankdecay.trackers", "pretrain.runs.services", ServiceSection, Service, _check
)
"""The services that ``logging.trackers`` can name."""

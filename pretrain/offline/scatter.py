"""Figures 4 and 6: show whether attention factors are balanced and norms are at their bound."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.factors import Factors
from pretrain.ranks.probe import Row
from pretrain.runs.outputs import write_csv, write_figure

_DECADE = 20
"""Points that span more than this factor are drawn on logarithmic axes."""


@dataclass
class Scatter:
    """Points of two scatter plots, gathered layer by layer.

    Left: squared norms of W_Q's rows against W_K's, and of W_V's rows against P's columns, for
    the first key/value head of each layer. Right: the Frobenius bound ½(‖A‖² + ‖B‖²) of every
    head against its nuclear norm.
    """

    points: list[dict[str, Any]] = field(default_factory=list)

    def add(self, tower: str, layer: int, factors: Factors, rows: list[Row]) -> None:
        """Add the points of one layer."""
        for product, (a, b) in factors.row_norms().items():
            self.points += [
                self._point("row", tower, layer, product, index, x, y)
                for index, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True))
            ]
        grouped = any(row["level"] == "group" for row in rows)
        self.points += [
            self._point("norm", tower, layer, row["product"], row["head"], row["nuclear_norm"],
                        row["frobenius_bound"])
            for row in rows
            if row["level"] == ("group" if grouped else "head")
        ]  # fmt: skip

    @staticmethod
    def _point(
        panel: str, tower: str, layer: int, product: str, index: int, x: float, y: float
    ) -> dict[str, Any]:
        return {
            "panel": panel,
            "tower": tower,
            "layer": layer,
            "product": product,
            "index": index,
            "a": x,
            "b": y,
        }

    def values(self, panel: str, product: str) -> tuple[list[float], list[float]]:
        """The finite points of one panel (``row`` or ``norm``) for one product."""
        chosen = [
            (point["a"], point["b"])
            for point in self.points
            if point["panel"] == panel
            and point["product"] == product
            and not math.isnan(point["a"])
        ]
        return [x for x, _ in chosen], [y for _, y in chosen]

    def correlation(self, panel: str, product: str) -> float:
        """Correlation of the logarithms of the points: 1 on a line in the diagonal's direction."""
        import numpy as np

        x, y = (np.array(coordinates) for coordinates in self.values(panel, product))
        keep = (x > 0) & (y > 0)
        if keep.sum() < 3:
            return math.nan
        return float(np.corrcoef(np.log(x[keep]), np.log(y[keep]))[0, 1])

    def balance(self, product: str) -> float:
        """Σ nuclear norm / Σ bound over all heads: 1 if every head is at its bound."""
        nuclear, bound = self.values("norm", product)
        return sum(nuclear) / sum(bound) if bound and sum(bound) else math.nan

    def write(self, folder: Path, name: str = "scatter", title: str = "") -> None:
        """Write ``NAME.png`` and ``NAME.csv``."""
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(folder / f"{name}.csv", self.points)
        self._draw(folder / f"{name}.png", title)

    def _draw(self, path: Path, title: str) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, panels = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
        words = (
            ("row", "qk", "‖row of W$_K$‖²", "‖row of W$_Q$‖²"),
            ("row", "vp", "‖column of P‖²", "‖row of W$_V$‖²"),
        )
        for axes, (panel, product, x_label, y_label) in zip(panels, words, strict=False):
            self._cloud(axes, panel, product, "")
            axes.set(xlabel=x_label, ylabel=y_label, title="first head of each layer")
        self._cloud(panels[2], "norm", "qk", "W$_{QK}$")
        self._cloud(panels[2], "norm", "vp", "W$_{VP}$")
        panels[2].set(xlabel="nuclear norm", ylabel="½(‖A‖² + ‖B‖²)", title="all heads")
        panels[2].legend(frameon=False)
        if title:
            figure.suptitle(title)
        write_figure(path, figure)
        plt.close(figure)

    def _cloud(self, axes: Any, panel: str, product: str, label: str) -> None:
        x, y = self.values(panel, product)
        pairs = [(p, q) for p, q in zip(x, y, strict=True) if p > 0 and q > 0]
        if not pairs:
            axes.text(0.5, 0.5, "not defined under QK-norm", transform=axes.transAxes, ha="center")
            return
        low, high = min(map(min, pairs)), max(map(max, pairs))
        axes.plot(*zip(*pairs, strict=True), ".", markersize=3, alpha=0.5, label=label)
        if high > _DECADE * low:
            axes.set(xscale="log", yscale="log")
        axes.plot([low, high], [low, high], color="grey", linewidth=0.8)

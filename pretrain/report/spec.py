"""Figures as data: panels of lines, points or heat maps, with choices.

Renderers draw one description for the page (interactive), for print (matplotlib) and as CSV.
"""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

_WIDEST = 44
"""Characters of a line of a legend."""


def in_lines(name: str) -> list[str]:
    """A name in lines that fit a legend; together they are the whole name."""
    return textwrap.wrap(name, _WIDEST, break_on_hyphens=False) or [name]


@dataclass(frozen=True)
class Series:
    """A line (or points) with an optional band."""

    name: str
    x: list[float]
    y: list[float]
    colour: float = 0.0
    """Position on an ordered scale, 0 to 1: the same item has the same colour in every panel."""
    low: list[float] | None = None
    high: list[float] | None = None
    dash: bool = False
    points: bool = False
    """Only markers, no line."""
    texts: list[str] | None = None
    """Texts that are shown with the values when hovering."""

    @property
    def is_point(self) -> bool:
        """Whether it is one point, of which a line and an area would show nothing."""
        return len(set(self.x)) == 1


@dataclass(frozen=True)
class Heat:
    """A matrix of colours."""

    rows: list[str]
    columns: list[str]
    values: list[list[float]]
    low: float
    high: float


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    x: str
    y: str
    series: list[Series] = field(default_factory=list)
    heat: Heat | None = None
    log_x: bool = False
    log_y: bool = False
    y_range: tuple[float, float] | None = None
    diagonal: bool = False
    """Draw y = x."""
    band: str = ""
    """What the bands of the series span, for the legend; empty: there are none."""


@dataclass(frozen=True)
class Control:
    """A choice of the reader."""

    name: str
    options: list[str]
    kind: Literal["select", "slider"] = "select"
    default: int = 0


Choice = tuple[int, ...]
"""An option of every control."""


@dataclass(frozen=True)
class Figure:
    """A figure of the report."""

    key: str
    title: str
    caption: str
    """Plain text: what was measured, on which runs, n, and what theory predicts."""
    controls: list[Control]
    view: Callable[[Choice], list[Panel]]
    """The panels for a choice."""
    hint: str = ""
    """How to use the figure on the page; print has no controls."""
    side_by_side: tuple[Choice, ...] = ()
    """The choices whose panels print shows together; none: the default one."""

    @property
    def default(self) -> Choice:
        """The choice that is shown first on the page."""
        return tuple(control.default for control in self.controls)

    @property
    def printed(self) -> list[Panel]:
        """The panels that print shows."""
        return [panel for choice in self._printed for panel in self.view(choice)]

    def printed_options(self, control: int) -> list[str]:
        """The options of a control that print shows, in order."""
        options = self.controls[control].options
        return list(dict.fromkeys(options[choice[control]] for choice in self._printed))

    @property
    def shown(self) -> str:
        """What print shows: ``layer: all layers, band: heads``; empty without controls."""
        return ", ".join(
            f"{control.name}: {' and '.join(self.printed_options(index))}"
            for index, control in enumerate(self.controls)
        )

    @property
    def _printed(self) -> tuple[Choice, ...]:
        return self.side_by_side or (self.default,)

    def choices(self) -> list[Choice]:
        """Every combination of options."""
        combinations: list[Choice] = [()]
        for control in self.controls:
            combinations = [
                (*choice, index) for choice in combinations for index in range(len(control.options))
            ]
        return combinations


def to_csv(figure: Figure) -> str:
    """Every value of every choice of a figure, as a long table."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [control.name for control in figure.controls]
    writer.writerow([*names, "panel", "series", "x", "y", "low", "high", "text"])
    for choice in figure.choices():
        words = [c.options[i] for c, i in zip(figure.controls, choice, strict=True)]
        for panel in figure.view(choice):
            for line in panel.series:
                for index, (x, y) in enumerate(zip(line.x, line.y, strict=True)):
                    low = line.low[index] if line.low else ""
                    high = line.high[index] if line.high else ""
                    note = line.texts[index] if line.texts else ""
                    writer.writerow([*words, panel.title, line.name, x, y, low, high, note])
            if panel.heat:
                for row, values in zip(panel.heat.rows, panel.heat.values, strict=True):
                    for column, value in zip(panel.heat.columns, values, strict=True):
                        writer.writerow([*words, panel.title, row, column, value, "", "", ""])
    return text.getvalue()

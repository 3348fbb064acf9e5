"""Cells and tables of a report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cell:
    """A value as text, with its colour and mark."""

    text: str
    shade: float = 0.0
    """-1 to 1: by how much it is clearly less or more than the baseline; 0: no colour."""
    mark: bool = False
    """A star: the difference from the baseline is clear (`Difference.is_clear`)."""


@dataclass(frozen=True)
class DataTable:
    """A table with a caption."""

    key: str
    title: str
    caption: str
    head: list[str]
    rows: list[list[Cell]]
    raw: list[dict[str, Any]] = field(default_factory=list)
    """The same values unrounded, for CSV."""
    names: tuple[str, ...] = ()
    """Columns of the CSV if there are no rows."""

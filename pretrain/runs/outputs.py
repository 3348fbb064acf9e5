"""Writes tables and figures to files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.files import write_aside


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows with equal keys as CSV."""
    rows = list(rows)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_aside(path, text.getvalue().encode("utf-8"))


def write_figure(path: Path, figure: Any) -> None:
    """Save a matplotlib figure as an image, in the format of the path's ending."""
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix[1:], dpi=130)
    write_aside(path, image.getvalue())

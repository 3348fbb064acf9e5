"""What a figure claims, with the number that decides it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain.errors import RunError


@dataclass(frozen=True)
class Check:
    """A prediction, the largest deviation from it that was seen, and the tolerance."""

    claim: str
    deviation: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the deviation is within the tolerance."""
        return self.deviation <= self.tolerance

    def __str__(self) -> str:
        verdict = "holds " if self.holds else "FAILS "
        return (
            f"{verdict} {self.claim}: deviation {self.deviation:.3g} (allowed {self.tolerance:g})"
        )


def conclude(figure: str, checks: list[Check], out: Path) -> None:
    """Print the checks and write them beside the figure.

    Raises:
        RunError: if one fails.
    """
    for check in checks:
        print(check)
    text = json.dumps([{**asdict(check), "holds": check.holds} for check in checks], indent=1)
    (out / f"{figure}.json").write_text(text, encoding="utf-8")
    print(f"written: {out / figure}.png, .csv, .json")
    failed = [check.claim for check in checks if not check.holds]
    if failed:
        raise RunError(f"{figure}: {len(failed)} prediction(s) failed: {'; '.join(failed)}")


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Rows of equal keys as CSV."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)

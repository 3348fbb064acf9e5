"""The predictions of a figure, each with the number that decides it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline.files import write_aside
from data_pipeline.strict_json import to_json
from pretrain.errors import RunError


@dataclass(frozen=True)
class Check:
    """A prediction, the largest deviation from it that was seen, and the tolerance."""

    claim: str
    deviation: float
    tolerance: float
    value: str = ""
    """The measured values as text, if the deviation alone is not clear."""
    decides: bool = True
    """False: reported but not required, because the setting is too small to decide it."""

    @property
    def holds(self) -> bool:
        """Whether the deviation is within the tolerance (NaN is not)."""
        return self.deviation <= self.tolerance

    def __str__(self) -> str:
        verdict = "holds " if self.holds else "FAILS " if self.decides else "not so"
        measured = f" ({self.value})" if self.value else ""
        return (
            f"{verdict} {self.claim}{measured}: deviation {self.deviation:.3g} (allowed "
            f"{self.tolerance:g})"
        )


def conclude(figure: str, checks: list[Check], out: Path, extra: str = "") -> None:
    """Print the checks and write them beside the figure.

    Args:
        extra: Markdown for the page, such as a table.

    Raises:
        RunError: if one fails that decides.
    """
    for check in checks:
        print(check)
    body = {
        "checks": [{**asdict(check), "holds": check.holds} for check in checks],
        "extra": extra,
    }
    write_aside(out / f"{figure}.json", to_json(body, indent=1).encode())
    print(f"written: {out / figure}.png, .csv, .json")
    failed = [check.claim for check in checks if check.decides and not check.holds]
    if failed:
        raise RunError(f"{figure}: {len(failed)} prediction(s) failed: {'; '.join(failed)}")

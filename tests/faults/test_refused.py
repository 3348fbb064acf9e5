"""A disk that takes no metrics: they wait, and no checkpoint leaves them behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.tools import GRIDS, PROCESSES, events_of, faulty, same_run, words_of
from tests.tools import assert_one_line, run_processes


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["one", "data"])
def test_the_last_lines_and_ranks_are_refused(
    grid: str, data: Path, tmp_path: Path, undisturbed: Callable[[str], Path],
    row: Callable[..., None],
) -> None:  # fmt: skip
    """The process ends with them in memory: their updates are made again, and nothing is lost."""
    words = words_of(tmp_path, data, *GRIDS[grid])
    done = faulty("refuse", 0, "9", words, PROCESSES[grid])
    assert done.returncode == 1, done.stderr
    if grid == "one":
        refused = "metrics.jsonl: No space left on device"
        assert_one_line(done.stderr, ("checkpoint at step 10 not written: ", refused))
    done = run_processes(words, PROCESSES[grid], 240)
    assert done.returncode == 0, done.stderr
    same_run(tmp_path / "run", undisturbed(grid))
    row("disk full at the end", "the last checkpoint", "the next start")


@pytest.mark.slow
@pytest.mark.parametrize(
    "updates",
    ["2,10", "6,7,8,10", *(pytest.param(one, marks=pytest.mark.long) for one in ("4,6", "5,10"))],
)
def test_refused_lines_and_ranks_come_later(
    updates: str, data: Path, tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    done = faulty("refuse", 0, updates, words_of(tmp_path, data))
    assert done.returncode == 0, done.stderr
    same_run(tmp_path / "run", undisturbed("one"))
    waits = any("measurements wait in memory" in event for event in events_of(tmp_path / "run"))
    assert waits == (updates != "6,7,8,10")  # they are measured after update 5

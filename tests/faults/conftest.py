"""Undisturbed runs to compare with, and the table of what was injected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.tools import GRIDS, PROCESSES, words_of
from tests.tools import made_once, pretrain


@pytest.fixture(scope="session")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Runs that nothing happens to, by grid; each is made once, when it is first asked for."""

    def run(grid: str) -> Path:
        def make(folder: Path) -> None:
            done = pretrain(*words_of(folder, data, *GRIDS[grid]), processes=PROCESSES[grid])
            assert done.returncode == 0, done.stderr

        return made_once(tmp_path_factory, f"whole-{grid}", make) / "run"

    return run


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Put a line into the table that is printed at the end."""

    def add(
        fault: str,
        detected: str,
        recovered: str,
        times: int = 1,
        samples: str = "none",
        weights: str = "bitwise",
    ) -> None:
        found = {
            "fault": fault, "times": times, "detected within": detected,
            "recovered within": recovered, "samples lost or repeated": samples,
            "weights": weights,
        }  # fmt: skip
        request.node.user_properties.append(("fault", found))

    return add

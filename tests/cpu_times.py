"""``--cpu-times FILE``: the processor time of each test, which other load does not change.

A test's time is that of this process, of the children that it waited for and of the warm server
with its forks, user and system. What a fixture takes counts for the test that first asks for it;
a process that its own parent did not wait for is not seen. Run it with or without xdist.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.warm import seconds_of_server


class CpuTimes:
    """Adds up the seconds of each test and writes them at the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = _seconds()
        self._tests: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._workers: dict[str, float] = defaultdict(float)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self,
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Put into the report what was used since the one before."""
        report = yield
        now = _seconds()
        report.user_properties.append(("cpu", now - self._last))
        self._last = now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add up, in the process that writes."""
        used: Any = dict(report.user_properties).get("cpu", 0.0)
        self._tests[report.nodeid][report.when or ""] += used
        self._workers[getattr(report, "worker_id", "main")] += used

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the table, except in a worker."""
        if not hasattr(session.config, "workerinput"):
            self._path.write_text(json.dumps(self._table(), indent=1) + "\n")

    def _table(self) -> dict[str, Any]:
        files: dict[str, float] = defaultdict(float)
        for name, phases in self._tests.items():
            files[name.split("::")[0]] += sum(phases.values())
        return {
            "seconds": round(sum(files.values()), 1),
            "workers": _largest_first(self._workers),
            "files": _largest_first(files),
            "tests": dict(
                sorted(
                    (
                        (name, {phase: round(used, 2) for phase, used in phases.items()})
                        for name, phases in self._tests.items()
                    ),
                    key=lambda pair: -sum(pair[1].values()),
                )
            ),
        }


def _largest_first(seconds: dict[str, float]) -> dict[str, float]:
    return {
        name: round(seconds[name], 1) for name in sorted(seconds, key=lambda one: -seconds[one])
    }


def _seconds() -> float:
    return sum(os.times()[:4]) + seconds_of_server()

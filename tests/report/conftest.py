"""Reports whose images no test looks at."""

from __future__ import annotations

import pytest

import pretrain.report.printed


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are empty files: they hold no text, and take most of a report's time."""
    monkeypatch.setattr(pretrain.report.printed, "draw", lambda *_: b"")

"""How a benchmark ends: its figures printed, with the command and the machine, and written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pretrain.runs.environment import environment


def finish(figures: dict[str, Any], out: Path | None, show: bool = True) -> None:
    """Print one JSON object and write it to ``out``, if that is given."""
    result = {"command": f"python {' '.join(sys.argv)}", **figures, "environment": environment()}
    text = json.dumps(result, indent=1)
    if show:
        print(text)
    if out:
        out.write_text(text + "\n", encoding="utf-8")

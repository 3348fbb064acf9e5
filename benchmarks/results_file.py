"""How a benchmark ends: its figures printed, with the command and the machine, and written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from pretrain.runs.environment import environment

_ANSWER = "RESULT "


def answer(figures: Any) -> None:
    """Give the process that asked for them some figures (`ask`)."""
    print(_ANSWER + json.dumps(figures))


def ask(*words: str) -> Any:
    """The figures that this program answers with these words, in a process of its own."""
    command = [sys.executable, sys.argv[0], *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if _ANSWER not in done.stdout:
        sys.exit(done.stderr)
    return answered(done.stdout)


def answered(printed: str) -> Any:
    """The figures in what a process printed."""
    return json.loads(printed.split(_ANSWER)[1])


def finish(figures: dict[str, Any], out: Path | None, show: bool = True) -> None:
    """Print one JSON object and write it to ``out``, if that is given."""
    result = {"command": f"python {' '.join(sys.argv)}", **figures, "environment": environment()}
    text = json.dumps(result, indent=1)
    if show:
        print(text)
    if out:
        out.write_text(text + "\n", encoding="utf-8")

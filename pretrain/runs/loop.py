"""Run folders that somebody else's loop wrote (`pretrain.api`), and not this program's training."""

from __future__ import annotations

from pathlib import Path

from pretrain.errors import UsageError

LOOP = "loop.json"
"""The record of the loop; a run folder that has it cannot be trained in."""


def refuse_loop(run: Path) -> None:
    """Refuse to train in the run folder of another loop.

    Raises:
        UsageError: naming the folder.
    """
    if (run / LOOP).exists():
        raise UsageError(f"{run}: holds the run of another loop ({LOOP}); choose another --out")

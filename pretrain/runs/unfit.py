"""Says why a folder has no checkpoint: it may be a sweep, or the run of another loop."""

from __future__ import annotations

from pathlib import Path

from pretrain.checkpoint.reader import CHECKPOINTS
from pretrain.runs.loop import LOOP

SWEEP = "sweep.json"
"""The plan of a sweep, in the folder of its runs."""


def why_no_checkpoint(path: Path) -> str:
    """What a folder without checkpoints is, and what to give instead."""
    if (path / SWEEP).is_file():
        runs = sorted(folder.parent for folder in path.glob(f"*/{CHECKPOINTS}"))
        example = f", such as {runs[0]}" if runs else "; none has a checkpoint yet"
        return f"is a sweep ({SWEEP}), not a run; give one of its runs{example}"
    if (path / LOOP).is_file():
        return (
            f"is a run of another loop ({LOOP}) and has no checkpoints of this program; give a run "
            "of `pretrain train` (`evaluate` also takes a folder with a saved Hugging Face model)"
        )
    return "has no checkpoint (give a run folder, RUN@STEP or a step-... folder)"

"""The sweeps behind the paper's figures: prepares their text and starts or resumes their runs."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from data_pipeline.files import held, write_aside
from data_pipeline.prepare import prepare_embedded
from launchers.sweeps import run
from pretrain.config.mapping import read_mapping
from pretrain.config.recipe import load_config
from pretrain.errors import RunError, UsageError

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "paper"


def experiment(name: str, runs: Path, parallel: int, data: Path | None = None) -> Path:
    """Train the runs of ``configs/paper/NAME.yaml`` that are not complete yet.

    Args:
        runs: folder of all of the paper's runs; each sweep has a folder in it.
        data: tokenised text to use instead of this Python installation's.

    Returns:
        The folder of the sweep's runs.

    Raises:
        UsageError: if the repository's ``configs`` do not exist.
        RunError: if a run failed.
    """
    source = CONFIGS / f"{name}.yaml"
    if not source.is_file():
        raise UsageError(f"{source}: does not exist; run from a clone of the repository")
    sweep = read_mapping(source, "sweep", "keys")
    recipe = (source.parent / sweep["recipe"]).resolve()
    sweep["recipe"] = str(recipe)
    out, file = runs / name, runs / f"{name}.yaml"
    with held(file):  # the sweep takes the lock of its own folder
        if load_config(recipe).task.kind == "text":
            text = data or prepare_embedded(runs / "text", _say)
            sweep["set"] = {**sweep.get("set", {}), "data.path": str(text)}
        write_aside(file, yaml.safe_dump(sweep, sort_keys=False).encode())
        if run(file, out, "local", parallel, None, [], False, False, 0.0, as_json=False):
            raise RunError(
                f"{out}: a run failed; see {out}/logs, then rerun the same command to continue"
            )
    return out


def _say(text: str) -> None:
    print(f"paper: {text}", file=sys.stderr, flush=True)

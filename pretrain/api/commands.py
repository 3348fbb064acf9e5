"""What the commands train, evaluate and ranks do, from Python; and run folders as tables.

Training and evaluation run in a process of their own, as on the command line: a process grid, its
signals and its memory end with it, and a notebook stays as it was.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from threading import Thread
from typing import IO, Any

import yaml
from torch import nn

from launchers.local import child_environment, program
from pretrain.api.families import Described
from pretrain.api.probe import RankProbe
from pretrain.api.tables import Table, as_table, from_columns
from pretrain.config.run import RanksConfig
from pretrain.errors import TRY_AGAIN, MachineError, RunError, UsageError
from pretrain.offline.ranks import find_weights, measure_weights
from pretrain.ranks.schema import BY_NAME
from pretrain.ranks.table import read_rank_columns
from pretrain.runs.folder import CONFIG, EVALUATION, read_evaluation, read_starts, recipe_of
from pretrain.runs.loop import LOOP, flat, nested, recorded_keys
from pretrain.runs.metrics import read_metrics


@dataclass(frozen=True)
class LoadedRun:
    """The contents of a run folder, of this program's training or of another loop."""

    path: Path
    recipe: dict[str, Any]
    """The whole recipe; of another loop, what is known of it."""
    metrics: Table
    """One row for each logged update: step, loss, learning_rate, grad_norm, tokens_per_second and
    λ in use by role."""
    ranks: Table
    """The rank table (docs/statistics.md)."""
    held_out: Table
    """One row for each held-out loss during training."""
    evaluation: dict[str, Any] | None
    """The evaluation at the end."""
    starts: list[dict[str, Any]]
    """Machine and versions of each start."""
    is_loop: bool
    """Whether another loop trained it."""


def load_run(run: Path | str) -> LoadedRun:
    """Read a run folder, also of a run that is training now.

    Raises:
        UsageError, RunError: naming what is missing or damaged.
    """
    path = Path(run)
    if not (path / CONFIG).is_file():
        raise UsageError(f"{path}: not a run folder (no {CONFIG})")
    ranks = read_rank_columns(path)
    ordered = sorted(ranks.names, key=list(BY_NAME).index)
    evaluation = None
    if (path / EVALUATION).is_file():
        evaluation = read_evaluation(path / EVALUATION)
    updates = [_flat(row) for row in read_metrics(path, "train")]
    return LoadedRun(
        path,
        _recipe(path),
        as_table(updates),
        from_columns({name: list(ranks.column(name)) for name in ordered}),
        as_table([_flat(row) for row in read_metrics(path, "evaluation")]),
        evaluation,
        read_starts(path),
        (path / LOOP).is_file(),
    )


def _recipe(path: Path) -> dict[str, Any]:
    """The whole recipe of a run; of another loop, the values that are known."""
    known = recorded_keys(path, path / CONFIG)
    recipe = recipe_of(path).model_dump(mode="json")
    return (
        recipe
        if known is None
        else nested({key: value for key, value in flat(recipe).items() if key in known})
    )


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics without its kind; λ of a role is the column ``decay_ROLE``."""
    decays = {f"decay_{name}": value for name, value in row.get("weight_decay", {}).items()}
    return {key: row[key] for key in row if key not in ("kind", "weight_decay")} | decays


def train(
    recipe: Path | str | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    out: Path | str | None = None,
    processes: int = 1,
) -> LoadedRun:
    """Train a recipe to its end, or continue its run, and read the run folder.

    Args:
        recipe: a YAML file, or its sections as a mapping, which needs ``out``.
        overrides: values at dotted keys, such as ``{"optimizer.learning_rate": 1e-3}``.
        out: the run folder; default: runs/NAME-OF-RECIPE.
        processes: number of processes on this machine.

    Raises:
        UsageError, RunError: the line that the command would print.
    """
    words = [f"{key}={json.dumps(value)}" for key, value in (overrides or {}).items()]
    words += ["--processes", str(processes)] if processes > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(recipe, Mapping):
            if out is None:
                raise UsageError("out: a recipe that is no file needs a run folder; give out=")
            file = Path(folder) / "recipe.yaml"
            file.write_text(yaml.safe_dump(dict(recipe)), encoding="utf-8")
        else:
            file = Path(recipe)
        run = Path(out) if out is not None else Path("runs") / file.stem
        _run(["train", str(file), *words, "--out", str(run)])
    return load_run(run)


def evaluate(target: Path | str, **options: Any) -> dict[str, Any]:
    """Held-out loss, perplexity and bits per byte of a run, a checkpoint or a model.

    Args:
        target: as for `pretrain evaluate`.
        options: its options, such as ``split="val"``, ``documents=100``, ``attention_rank=0.5``.

    Returns:
        The content of the file that the command writes.

    Raises:
        UsageError, RunError: the line that the command would print.
    """
    words = []
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if value is not None and value is not False:
            words += [option] if value is True else [option, str(value)]
    figures: dict[str, Any] = json.loads(_run(["evaluate", str(target), *words, "--json"]))
    return figures


def ranks(
    target: Path | str | nn.Module,
    *,
    family: Described = None,
    threshold: float | None = None,
    denominator: str | None = None,
    spectra: bool = False,
    allow_unused: bool = False,
) -> Table:
    """The rank table of a run, of stored models, or of a model in memory.

    Args:
        target: as for `pretrain ranks`, or a model.
        family: as in `pretrain.api.decay_groups`.
        threshold, denominator, spectra: as the keys of the recipe's section ``ranks``; default:
            the run's.
        allow_unused: leave out attention that cannot be measured (of stored models).

    Raises:
        UsageError, ModelError: one line that names what was not found.
    """
    given = {"threshold": threshold, "denominator": denominator}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if isinstance(target, nn.Module):
        probe = RankProbe(target, family=family, **{**options, "spectra": spectra})
        probe.measure(0)
        return probe.table()
    models = find_weights(str(target), _file_of(family), allow_unused=allow_unused)
    if not models:
        raise UsageError(f"{target}: a loop saved no model here; its table is load_run().ranks")
    base = (models[-1].ranks or RanksConfig()).model_dump()
    rows, _ = measure_weights(
        models, RanksConfig.model_validate({**base, **options, "spectra": spectra})
    )
    return as_table(rows, [name for name in BY_NAME if any(name in row for row in rows)])


def _file_of(family: Described) -> Path | None:
    """The file of a family, as the command takes it."""
    if family is None or isinstance(family, Path):
        return family
    raise UsageError("family: of a stored model is a YAML file; give its path as a Path")


def _run(words: list[str]) -> str:
    """Run a command in a process of its own, show its messages, and return its output.

    Raises:
        UsageError, RunError, MachineError: its last line, by its exit code.
    """
    process = Popen(
        [*program(), *words],
        env=child_environment(),
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
        text=True,
        errors="replace",
        process_group=0,  # Ctrl-C reaches this process alone, which hands it on once
    )
    assert process.stdout is not None and process.stderr is not None
    said: list[str] = []
    reader = Thread(target=_show, args=(process.stderr, said), daemon=True)
    reader.start()
    try:
        output = process.stdout.read()
        code = process.wait()
    except BaseException:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    reader.join()
    if code == 0:
        return output
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    message = errors[-1] if errors else f"pretrain {words[0]} ended with exit code {code}"
    kind = {2: UsageError, TRY_AGAIN: MachineError}.get(code, RunError)
    raise kind(message)


def _show(stream: IO[str], said: list[str]) -> None:
    """Print the lines of a process as they come; sys.stderr may be a notebook's."""
    for line in stream:
        said.append(line.rstrip("\n"))
        if not line.startswith("error: "):  # it is raised
            with contextlib.suppress(OSError):  # a full disk: the process must not wait for us
                print(line, end="", file=sys.stderr)

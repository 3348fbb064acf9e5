"""What `pretrain watch` shows of a run and of a sweep, read without locks."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pretrain.cli.console import clock, on_one_line
from pretrain.config.recipe import Config
from pretrain.errors import RunError, UsageError
from pretrain.ranks.probe import by_layer
from pretrain.ranks.table import read_rank_columns
from pretrain.report.sample import some_of
from pretrain.runs.finished import is_complete
from pretrain.runs.folder import CONFIG, known_recipe
from pretrain.runs.follow import Follower, Present, in_words, number
from pretrain.runs.lock import holds
from pretrain.runs.loop import recorded_keys
from pretrain.runs.metrics import METRICS
from pretrain.runs.records import SweepRecord, read_record
from pretrain.sweep.config import by_numbers
from pretrain.sweep.run import SWEEP, last_line
from pretrain.sweep.table import COLUMNS, figures, table_of

_BLOCKS = "▁▂▃▄▅▆▇█"
_COURSE = 24
"""Letters of the course of a layer's rank."""
_EVENTS, _MOST_GROUPS = 5, 6
"""Number of events, and of values of λ, that are shown."""
_RECENT = 120.0
"""Seconds after its last line in which a run on another machine counts as training."""
_TRUNK = "trunk,"
"""How names of a sweep's trunk runs begin."""


class View(Protocol):
    """A thing to watch."""

    is_finished: bool

    def look(self) -> None:
        """Read what is new."""

    def draw(self, width: int, height: int) -> RenderableType:
        """The present state, for a terminal of this size."""

    def line(self) -> str:
        """The present state in one line."""


def view_of(path: Path) -> View:
    """The view of a run folder or of a sweep's folder.

    Raises:
        UsageError: if it is neither.
    """
    if (path / CONFIG).is_file() or (path / METRICS).is_file():
        return RunView(path)
    names = _names(path) if path.is_dir() else []
    if names:
        return SweepView(path, names)
    if not path.exists():
        raise UsageError(f"{path}: no such folder; start the run first (pretrain train … --out)")
    raise UsageError(
        f"{path}: neither a run folder (no {CONFIG}) nor a folder of runs (no {SWEEP}); give the "
        "--out of `pretrain train` or `pretrain sweep`"
    )


def _names(path: Path) -> list[str]:
    """The runs of a sweep, or of any folder of run folders: those planned and those there."""
    planned: Iterable[str] = ()
    with suppress(FileNotFoundError):
        planned = read_record(path / SWEEP, SweepRecord)["runs"]
    there = [one.parent.name for one in path.glob(f"*/{CONFIG}")]
    return sorted({*planned, *there}, key=_place)


def _place(name: str) -> tuple[bool, Any]:
    """Trunks first; numbers in names by their value."""
    return not name.startswith(_TRUNK), by_numbers(name)


class RunView:
    """A run: its metrics, its recipe, and whether a process trains it."""

    def __init__(self, run: Path, whole: bool = True) -> None:
        self.run = run
        self._follower = Follower(run, whole)
        self._config: Config | None = None
        self._recorded: frozenset[str] | None = None
        self._table: tuple[int, list[dict[str, Any]]] = (-1, [])
        self.state = "waiting"
        """waiting, starting, running, stopped at a step, or done: the words of a sweep's table."""
        self.is_finished = False

    @property
    def present(self) -> Present:
        """What the run has logged."""
        return self._follower.present

    @property
    def steps(self) -> int:
        """The number of updates of the recipe; 0 if it is not known."""
        return self._config.train.steps if self._config and self._knows("train.steps") else 0

    def _knows(self, *keys: str) -> bool:
        """Whether these values of the recipe are facts (`recorded_keys`)."""
        return self._recorded is None or self._recorded.issuperset(keys)

    def look(self) -> None:
        """Read what is new."""
        self._follower.look()
        if self._config is None or self._recorded is not None:  # a loop may add to its recipe
            self._config = known_recipe(self.run)
            with suppress(RunError, UsageError):
                self._recorded = recorded_keys(self.run, self.run / CONFIG)
        done = self._config is not None and is_complete(self.run, self._config)
        if self._recorded is not None:  # a loop has no checkpoints of ours
            done = 0 < self.steps <= self.present.step
        self.is_finished = done and not self._is_training()
        self.state = "done" if self.is_finished else self._state()

    def _is_training(self) -> bool:
        held = holds(self.run)
        if held is None:  # another machine, which nothing here can ask
            with suppress(OSError):
                return time.time() - (self.run / METRICS).stat().st_mtime < _RECENT
        return bool(held)

    def _state(self) -> str:
        if self._is_training():
            return "running" if self.present.step else "starting"
        return f"stopped at step {self.present.step}" if self.present.step else "waiting"

    @property
    def left(self) -> float | None:
        """Seconds to the last step at the present speed, without measurements."""
        speed = self.present.speed.value
        if self._config is None or not speed or not self._is_training():
            return None
        if not self._knows("train.steps", "train.global_batch", "model.context"):
            return None
        train, context = self._config.train, self._config.model.context
        return (train.steps - self.present.step) * train.global_batch * context / speed

    def line(self) -> str:
        """The present state in one line."""
        now = self.present
        ranks = f" rank QK/VP {in_words(now.ranks)}" if now.ranks else ""
        loss = f" loss {now.loss:.3f}" if now.loss is not None else ""
        speed = f" {now.speed.value:,.0f} tokens/s" if now.speed.value else ""
        text = f"{self.run} {self.state} {now.step}/{self.steps or '?'}{loss}{ranks}{speed}"
        return on_one_line(text)

    def row(self) -> list[str]:
        """Cells of a sweep's table (`pretrain.sweep.table.COLUMNS`)."""
        step = f"{self.present.step}/{self.steps}" if self.steps else ""
        left = "" if self.left is None else clock(self.left)
        state = self.state.partition(" at ")[0]  # the next cell has the step
        return [self.run.name, state, step, *figures(self.present, self.left is not None),
                left, ""]  # fmt: skip

    def draw(self, width: int, height: int) -> RenderableType:
        """The present state, for a terminal of this size."""
        parts: list[RenderableType] = [Text(text) for text in (self._head(), *self._figures())]
        losses = [loss for _, loss in self.present.losses]
        if losses:
            low, high = _ends(losses)
            course = _course(losses, low, high, max(10, min(60, width - 40)))
            parts.append(Text(f"loss      {course}  {losses[0]:.3f} → {losses[-1]:.3f}"))
        parts.append(self._ranks(max(4, height - 18)))
        parts += [Text(text) for text in (*self._decays(), *self._events())]
        if self.present.damaged:
            parts.append(Text(f"{self.present.damaged} damaged lines of {METRICS} are left out"))
        return Group(*parts)

    def _head(self) -> str:
        left = "" if self.left is None else f"   {clock(self.left)} left"
        return f"{self.run}   {self.state}   step {self.present.step}/{self.steps or '?'}{left}"

    def _figures(self) -> list[str]:
        """Lines about the last update and the last evaluation."""
        now = self.present
        if not now.update:
            return ["nothing is logged yet"]
        held = now.held_out
        losses = [f"loss {now.loss:.4f}"]
        losses += [f"held-out {number(held.get('loss')):.4f} (step {held['step']})"] if held else []
        losses += [f"{now.speed.value:,.0f} tokens/s"] if now.speed.value else []
        names = {"learning_rate": "learning rate", "grad_norm": "gradient norm"}
        others = [f"{names[name]} {number(now.update[name]):.3g}" for name in names
                  if name in now.update]  # fmt: skip
        return ["   ".join(losses), "   ".join(others)]

    def _ranks(self, most: int) -> RenderableType:
        """Mean pseudo-rank by layer, with its course, for at most so many layers."""
        measured = self._measured()
        if not measured:
            every = f" (every {self._config.interval('ranks')} steps)" if self._config else ""
            return Text(f"pseudo-rank: nothing is measured yet{every}")
        last = measured[-1]
        names = sorted({name.rpartition("_")[2] for name in last["rank_by_layer"]}, key=int)
        shown = some_of(names, most)
        some = f", {len(shown)} of {len(names)} layers" if len(shown) < len(names) else ""
        title = Text(f"pseudo-rank, mean over heads, step {last['step']}{some}", "italic")
        table = Table(box=None, pad_edge=False)
        for column in ("layer", "W_QK", "", "W_VP", ""):
            table.add_column(column, justify="left" if not column else "right", no_wrap=True)
        for layer in shown:
            cells = [str(int(layer))]
            for product in ("qk", "vp"):
                course = [number(row["rank_by_layer"].get(f"{product}_layer_{layer}"))
                          for row in measured]  # fmt: skip
                cells += [f"{course[-1]:.3f}", _course(course, 0.0, 1.0, _COURSE)]
            table.add_row(*cells)
        return Group(title, table)

    def _measured(self) -> list[dict[str, Any]]:
        """Steps and ranks by layer; of runs of earlier versions, from the table of ranks."""
        rows = [row for row in self.present.measured if isinstance(row.get("rank_by_layer"), dict)]
        last = self.present.ranks.get("step", 0)
        if rows and rows[-1]["step"] == last:
            return rows
        if self._table[0] != last:
            with suppress(RunError, UsageError, OSError):  # being written: read at the next look
                self._table = last, _from_table(self.run)
        return self._table[1]

    def _decays(self) -> list[str]:
        decays = self.present.update.get("weight_decay")
        if not isinstance(decays, dict) or not decays:
            return []
        groups: dict[str, list[str]] = {}
        for name, value in decays.items():
            groups.setdefault(f"{number(value):.4g}", []).append(str(name))
        return [f"λ = {value} {_few(names)}" for value, names in groups.items()][:_MOST_GROUPS]

    def _events(self) -> list[str]:
        return [
            on_one_line(f"step {row['step']}: {row['message']}")
            for row in list(self.present.events)[-_EVENTS:]
        ]


def _from_table(run: Path) -> list[dict[str, Any]]:
    columns = read_rank_columns(run, ["pseudo_rank"], lambda steps: some_of(steps, _COURSE))
    by_step: dict[int, list[Any]] = {}
    for row in columns:
        by_step.setdefault(row["step"], []).append(row)
    return [{"step": step, "rank_by_layer": by_layer(rows)} for step, rows in by_step.items()]


def _few(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _ends(values: Sequence[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    return min(finite), max(finite)


def _course(values: Sequence[float], low: float, high: float, width: int) -> str:
    """A line of blocks, from the lowest to the highest; ``·`` where a value is not finite."""
    span = high - low or 1.0
    return "".join(
        _BLOCKS[min(7, max(0, int((value - low) / span * 8)))] if math.isfinite(value) else "·"
        for value in some_of(values, width)
    )


class SweepView:
    """A sweep, or a folder of runs: one row for each."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        self._views = {name: RunView(folder / name, whole=False) for name in names}
        self.is_finished = False

    def look(self) -> None:
        """Read what is new; a run that is finished is not read again."""
        with suppress(RunError):  # its record is being replaced
            for name in _names(self.folder):
                self._views.setdefault(name, RunView(self.folder / name, whole=False))
        for name, view in self._views.items():
            if not view.is_finished:
                view.look()
            if name.startswith(_TRUNK) and view.state.startswith("stopped"):
                view.state = "trunk"
        self.is_finished = not self._open()

    def _open(self) -> list[RunView]:
        return [view for name, view in self._views.items()
                if not view.is_finished and not name.startswith(_TRUNK)]  # fmt: skip

    def _title(self) -> str:
        planned = [name for name in self._views if not name.startswith(_TRUNK)]
        return f"{self.folder}: {len(planned) - len(self._open())} of {len(planned)} done"

    def line(self) -> str:
        """The present state in one line."""
        active = [view for view in self._views.values() if view.state == "running"]
        words = ", ".join(
            f"{view.run.name} {view.present.step}/{view.steps}" for view in active[:4]
        )
        return on_one_line(f"{self._title()}{'; ' if words else ''}{words}")

    def draw(self, width: int, height: int) -> RenderableType:
        """The present state, for a terminal of this size: running and failed runs before others."""
        order = sorted(
            self._views.values(),
            key=lambda view: (_ORDER.get(view.state, 1), _place(view.run.name)),
        )
        most = max(5, height - 6)
        rows = [[*view.row()[:-1], self._note(view)] for view in order[:most]]
        if len(order) > most:
            rows.append([f"... {len(order) - most} more", *[""] * (len(COLUMNS) - 1)])
        return table_of(self._title(), rows)

    def _note(self, view: RunView) -> str:
        """Why a stopped run does not train, by its log."""
        if not view.state.startswith(("stopped", "waiting")):
            return ""
        said = last_line(self.folder / "logs" / f"{view.run.name}.log")
        return on_one_line(said) if said.startswith("error: ") else ""


_ORDER = {"running": 0, "starting": 0, "waiting": 2, "done": 3, "trunk": 3}

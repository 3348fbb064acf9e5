"""Rank statistics of any model during its training, in the table of `pretrain.ranks`."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from models.huggingface import AttentionTower
from models.live import LiveTensors, config_of, live_towers
from pretrain.api.families import Described, described
from pretrain.api.folder import LoopFolder, loop_recipe
from pretrain.api.groups import DecayGroups
from pretrain.api.tables import Table, as_table
from pretrain.api.watched import WatchedDecay, books_without_optimizer
from pretrain.config.run import RanksConfig
from pretrain.decay.sites import DecayRecords
from pretrain.errors import UsageError
from pretrain.offline.ranks import Stack, measure_layer
from pretrain.ranks.probe import Row
from pretrain.ranks.schema import BY_NAME


class RankProbe:
    """Measures the attention products of a model in memory, and can keep a run folder.

    ``with RankProbe(model, "runs/mine", steps=1000, decay=groups) as probe: ... probe.step(n)``
    """

    def __init__(
        self,
        model: nn.Module,
        run: Path | str | None = None,
        *,
        decay: DecayGroups | torch.optim.Optimizer | None = None,
        every: int = 0,
        steps: int = 0,
        log_every: int = 10,
        family: Described = None,
        tower: str = "",
        threshold: float = 0.95,
        denominator: str = "head",
        spectra: bool = False,
        **about: Any,
    ) -> None:
        """
        Args:
            model: plain, compiled, wrapped by DistributedDataParallel, or sharded by
                ``fully_shard``.
            run: folder for the table and the metrics; None: only `measure` and `table`.
            decay: the groups, or an optimizer, whose λ is recorded beside each measurement.
            every: updates between measurements; 0: a twentieth of ``steps``, or 100.
            steps: number of updates of the run; 0: the number when it is closed.
            log_every: updates between lines of metrics (a loss on a GPU is waited for).
            family: as in `decay_groups`.
            tower: which stack of attention, for a model that has several.
            threshold, denominator, spectra: as the keys of the recipe's section ``ranks``.
            about: for the folder's recipe: ``seed``, ``learning_rate`` (the largest),
                ``global_batch``, ``context``, ``precision``; other names are only recorded.

        Raises:
            ModelError: naming what was not found, and for an unknown family how to describe it.
            UsageError: if the folder cannot be used, or a model with several towers has one table.
        """
        self._model, self._family = model, described(family, model)
        self._towers = _chosen(live_towers(model, self._family), tower, run is not None)
        self._sharded = LiveTensors(model).is_sharded
        self.config = RanksConfig.model_validate(
            {"threshold": threshold, "denominator": denominator, "spectra": spectra}
        )
        self._every = every or max(1, steps // 20 if steps else 100)
        self._log_every, self._steps = log_every, steps
        self._decay = (
            WatchedDecay(decay, model, self._family)
            if isinstance(decay, torch.optim.Optimizer)
            else decay
        )
        self._rows: dict[int, list[Row]] = {}
        self._last, self._about = 0, about
        self._folder = self._open(Path(run)) if run is not None and is_main() else None

    def _open(self, run: Path) -> LoopFolder:
        about = {**self._about, "steps": self._steps}
        words = self._decay.words if self._decay else None
        recipe = loop_recipe(
            self._towers[0].shape, config_of(self._model), words,
            self.config.model_copy(update={"every": self._every}), about,
        )  # fmt: skip
        known = {key: value for key, value in about.items() if isinstance(value, str | int | float)}
        model = {"class": LiveTensors(self._model).folder}
        return LoopFolder(run, recipe, {"loop": "own", **known, **model})

    @property
    def last(self) -> int:
        """The last update that it took notice of."""
        return self._last

    def __enter__(self) -> RankProbe:
        self.begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def begin(self, step: int | None = None) -> None:
        """Start, or continue after ``step`` updates, and measure; what came later is removed.

        Raises:
            UsageError: if it starts in a folder that has measurements of another run.
        """
        if self._folder:
            self._folder.begin(step)
        self._last = step or 0
        self._rows = {at: rows for at, rows in self._rows.items() if at <= self._last}
        self.measure(self._last)

    def step(self, step: int, **figures: Any) -> None:
        """Take notice of an update; call it on every process after the optimizer's step.

        Args:
            step: number of updates made so far.
            figures: loss (nats per token), learning_rate, grad_norm, tokens_per_second, as numbers
                or tensors; tokens: trained on so far.
        """
        self._last = step
        tokens = figures.pop("tokens", None)
        if figures and (step % self._log_every == 0 or step == self._steps):
            self.log(step, **figures)
        if step % self._every == 0 or step == self._steps:
            self.measure(step, tokens)

    def log(self, step: int, **figures: Any) -> None:
        """Write the figures of an update now."""
        if self._folder:
            self._folder.log(step, figures, self._decay.in_use() if self._decay else {})

    def evaluation(self, step: int, loss: float) -> None:
        """Record a held-out loss (nats per token)."""
        if self._folder:
            self._folder.evaluation(step, float(loss))

    @torch.no_grad()
    def measure(self, step: int, tokens: int | None = None) -> list[Row]:
        """Measure every head now; a collective call if the model is sharded.

        Returns:
            The rows. Of a model that is not sharded, only the main process measures.
        """
        if not self._sharded and not is_main():
            return []
        began = time.monotonic()
        books = self._books()
        rows = [
            {**row, "step": step, "tokens": tokens, **({"tower": one.name} if one.name else {})}
            for one in self._towers
            for row in self._rows_of(one, books)
        ]
        self._rows[step] = rows
        if self._folder:
            plain = [{key: row[key] for key in row if key != "tower"} for row in rows]
            self._folder.ranks(step, plain, time.monotonic() - began)
        return rows

    def _books(self) -> DecayRecords | None:
        """The decay applied so far; which matrices are frozen is looked up each time."""
        if self._decay is None:
            return None
        rest = books_without_optimizer(self._model, self._family)
        frozen = {site for site, book in rest.items() if book.frozen}
        ours = self._decay.books()
        for site in frozen & ours.keys():
            ours[site] = replace(ours[site], decay=0.0, frozen=True)
        return rest | ours

    def _rows_of(self, tower: AttentionTower, books: DecayRecords | None) -> list[Row]:
        """The rows of a stack; processes of a sharded model divide its layers."""
        size = dist.get_world_size() if self._sharded else 1
        me = dist.get_rank() if self._sharded else 0
        stack = Stack(tower.name, tower.shape, tower.layer, tower.shape_of, books)
        mine: list[Row] = []
        for layer in range(tower.shape.num_layers):
            factors = tower.layer(layer)  # gathered on all processes
            if layer % size == me:
                mine += measure_layer(factors, layer, stack, self.config)
        parts = [mine]
        if size > 1:
            parts = [[] for _ in range(size)]
            dist.all_gather_object(parts, mine)
        return sorted(
            (row for part in parts for row in part),
            key=lambda row: (row["layer"], row["product"], row["level"], row["head"]),
        )

    def table(self) -> Table:
        """All measurements so far: a DataFrame where pandas is installed, else columns."""
        rows = [row for step in sorted(self._rows) for row in self._rows[step]]
        return as_table(rows, [name for name in BY_NAME if any(name in row for row in rows)])

    def close(self) -> None:
        """Complete the run folder."""
        if self._folder:
            self._folder.close(self._last)
            self._folder = None


def is_main() -> bool:
    """Whether this is the process that writes."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _chosen(towers: list[AttentionTower], wanted: str, for_table: bool) -> list[AttentionTower]:
    names = [tower.name for tower in towers]
    if wanted:
        if wanted not in names:
            raise UsageError(f"tower: {wanted!r} is not one of {', '.join(filter(None, names))}")
        return [tower for tower in towers if tower.name == wanted]
    if for_table and len(towers) > 1:
        raise UsageError(
            f"tower: the model has {', '.join(names)}, and a run folder is for one of them; name it"
        )
    return towers

"""Measurements that the CPU's threads finish while a GPU trains.

The factors of all heads are copied to host memory beside the first pass of the next update. A
thread computes the rows from the update after that on. They are collected when they are there (on
several processes, some updates later), or where somebody needs them. Each of these steps comes at
the same update on every process.
"""

from __future__ import annotations

from collections.abc import Callable

from data_pipeline.background import Background
from pretrain.config.run import RanksConfig
from pretrain.distributed.main_process import MainProcess
from pretrain.engine.engine import Engine
from pretrain.errors import RunError, attempt
from pretrain.ranks.probe import Row, copied_factors, in_order, rows_of

_UPDATES = 10
"""Updates after which the rows of several processes are collected."""
_MOST = 1 << 29
"""Number of elements of factors that a process keeps in host memory: 2 GiB in float32."""


class LateRanks:
    """The measurement of a training that is not finished yet; there is one at a time."""

    def __init__(self, engine: Engine) -> None:
        """All processes make one together."""
        self._engine, self._main = engine, MainProcess(engine.grid)
        self._step: int | None = None
        self._computing: _Computing | None = None

    def can_begin(self) -> bool:
        """Whether a measurement may be finished later: a GPU has begun the next update, and the
        factors fit into host memory. Equal on every process."""
        grid, model = self._engine.grid, self._engine.config.model
        shape = model.attention_shape
        heads = 2 * shape.num_attention_heads + 2 * shape.key_value_heads
        numel = shape.num_layers * heads * shape.head_size * shape.hidden_size
        return self._engine.has_begun_next and numel <= _MOST * grid.world_size

    def begin(self, step: int, tokens: int, config: RanksConfig) -> None:
        """Start to copy the weights after update ``step``; a collective call.

        Args:
            tokens: trained so far.
        """
        engine = self._engine
        shape, books = engine.config.model.attention_shape, engine.control.books()
        parts = copied_factors(engine)

        def rows() -> list[Row]:
            found = [row for places, factors in parts
                     for row in rows_of(factors, places, shape, books, config)]  # fmt: skip
            for row in found:
                row.update(step=step, tokens=tokens)
            return found

        self._step, self._computing = step, _Computing(rows)

    def go_on(self, step: int) -> tuple[int, list[Row]] | None:
        """Take the next step of an unfinished measurement, after update ``step``.

        Returns:
            The step and all rows (on the main process), once they are collected.
        """
        if self._step is None or self._computing is None or step <= self._step:
            return None
        if step == self._step + 1:
            # The device has made the copies: this update came after them, and its loss was read.
            self._computing.start()
            return None
        alone = self._engine.grid.world_size == 1
        ready = self._computing.ended() if alone else step > self._step + _UPDATES
        return self.finish() if ready else None

    def finish(self) -> tuple[int, list[Row]] | None:
        """Wait for an unfinished measurement; a collective call.

        Returns:
            The step and all rows (on the main process), or None if there is none.

        Raises:
            RunError: on every process, if one could not compute its rows.
        """
        if self._step is None or self._computing is None:
            return None
        step, computing = self._step, self._computing
        self.forget()
        if not computing.started:
            self._engine.beside.wait()
        rows, problem = computing.result()
        found = self._main.gather((rows, problem))
        problem = self._main.tell(next((reason for _, reason in found if reason), ""))
        if problem:
            raise RunError(f"step {step}: ranks could not be measured: {problem}")
        return step, in_order([row for part, _ in found for row in part])

    def forget(self) -> None:
        """Drop an unfinished measurement, because the run goes back before it."""
        self._step = self._computing = None


class _Computing:
    """A function that a thread calls."""

    def __init__(self, work: Callable[[], list[Row]]) -> None:
        self._work = work
        self._rows: list[Row] = []
        self._problem = "its thread did not end"
        self._thread = Background(self._run, "ranks")
        self.started = False

    def start(self) -> None:
        self.started = True
        self._thread.start()

    def ended(self) -> bool:
        """Whether the rows are there."""
        return self.started and self._thread.wait(0.0)

    def result(self) -> tuple[list[Row], str]:
        """The rows, or why there are none."""
        if not self.started:
            self.start()
        self._thread.wait()
        return self._rows, self._problem

    def _run(self) -> None:
        rows, self._problem = attempt(self._work)
        self._rows = rows or []

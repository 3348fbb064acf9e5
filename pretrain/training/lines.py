"""The lines about updates: in the metrics, and on the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pretrain.cli.console import Progress
from pretrain.engine.stopwatch import Stopwatch
from pretrain.runs.follow import Speed, in_words
from pretrain.training.state import Training
from pretrain.training.utilisation import Utilisation


class UpdateLog:
    """Writes a line about the last updates, and shows progress.

    The speed is that of training only: what runs beside it (`beside`) is counted by its name.
    """

    def __init__(self, training: Training, first: int) -> None:
        """
        Args:
            first: the step from which training continues.
        """
        self._training, self._logged = training, first
        config, grid = training.config, training.grid
        self._tokens = config.train.global_batch * config.model.context
        self._progress = Progress(training.last, training.run.name, grid.is_main, first)
        self._speed, self._utilisation = Speed(), Utilisation(config, grid)
        self._beside = Stopwatch(torch.device("cpu"))
        training.engine.stopwatch.take()  # what updates that a fault undid have left
        self._began = time.monotonic()

    def write(self, step: int, loss: float, rate: float) -> None:
        """Write the line of a step.

        Args:
            loss: mean over the global batch, in nats per token.
            rate: η of the update.
        """
        training, now = self._training, time.monotonic()
        tokens, seconds = (step - self._logged) * self._tokens, now - self._began
        speed, engine = tokens / seconds, training.engine
        training.tracker.log(
            "train",
            step,
            {
                "tokens": step * self._tokens,
                "loss": loss,
                "learning_rate": rate,
                "grad_norm": engine.gradient_norm,
                "tokens_per_second": speed,
                "seconds": seconds,
                "time": {**engine.stopwatch.take(), **self._beside.take()},
                "device": self._utilisation.figures(speed),
                "weight_decay": engine.control.in_use(),
            },
        )
        self._speed.add(tokens, seconds)
        self._began, self._logged = now, step

    @contextmanager
    def beside(self, name: str) -> Iterator[None]:
        """Count a block as work beside training: ``statistics``, ``evaluation``, ``saving``."""
        began = time.monotonic()
        with self._beside.part(name):
            yield
        self._began += time.monotonic() - began

    def show(self, step: int, loss: float) -> None:
        """Show a step that has a line: loss, mean pseudo-ranks of W_QK and W_VP, smoothed speed."""
        if self._logged != step:
            return
        ranks = in_words(self._training.moving.ranks)
        measured = f"rank QK/VP {ranks} " if ranks else ""
        text = f"loss {loss:.3f} {measured}{self._speed.value:,.0f} tokens/s"
        self._progress.update(step, text)

    def close(self) -> None:
        """Remove the progress bar."""
        self._progress.close()

"""Learning-rate and decay schedules: pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable


def constant(progress: float) -> float:
    """Always 1."""
    return 1.0


def linear(progress: float) -> float:
    """From 1 to 0 in a straight line."""
    return 1.0 - progress


def cosine(progress: float) -> float:
    """From 1 to 0 along half a cosine (Loshchilov & Hutter 2017)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


SHAPES: dict[str, Callable[[float], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
}


def learning_rate(
    step: int,
    steps: int,
    peak: float,
    kind: str = "cosine",
    warmup_steps: int = 0,
    final_fraction: float = 0.1,
    decay_steps: int = 0,
) -> float:
    """Learning rate of the update number ``step`` (the first is 0) in a run of ``steps``.

    Args:
        peak: the rate after warm-up.
        kind: ``constant``, ``linear``, ``cosine``, or ``wsd`` (warm-up, stable, decay: Hu et
            al. 2024), which stays at the peak until the last ``decay_steps`` and then falls
            linearly.
        warmup_steps: linear rise; update k of it has rate peak·(k+1)/(warmup_steps+1).
        final_fraction: the rate at the last update, as a share of the peak (not `constant`).
        decay_steps: length of the final fall of ``wsd``.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if kind == "wsd":
        start, shape = max(warmup_steps, steps - decay_steps), SHAPES["linear"]
    else:
        start, shape = warmup_steps, SHAPES[kind]
    if step < start or kind == "constant":
        return peak
    progress = min(1.0, (step - start) / max(1, steps - 1 - start))
    return peak * (final_fraction + (1.0 - final_fraction) * shape(progress))


def in_steps(value: float, steps: int) -> int:
    """A length given as a share of the run (< 1) or in steps, in steps."""
    return round(value * steps) if value < 1 else round(value)


def decay_multiplier(
    step: int,
    steps: int,
    shape: str,
    start: float = 0.0,
    stop: float | None = None,
    first: float = 1.0,
    last: float = 0.0,
) -> float:
    """The multiplier of λ in update number ``step`` (the first is 0).

    Args:
        shape: ``linear`` and ``cosine`` go from ``first`` (until ``start``) to ``last`` (from
            ``stop`` on); ``warmup`` goes linearly from 0 to ``first``; ``step`` jumps from
            ``first`` to ``last`` at ``start``; ``window`` is ``first`` from ``start`` to before
            ``stop`` and ``last`` outside.
        start, stop: shares of the run if below 1, else steps; no ``stop``: the end of the run.
    """
    begin = in_steps(start, steps)
    end = steps if stop is None else in_steps(stop, steps)
    if shape == "window":
        return first if begin <= step < end else last
    if shape == "step":
        return first if step < begin else last
    progress = min(1.0, max(0.0, (step - begin) / max(1, end - begin)))
    if shape == "warmup":
        return first * progress
    return last + (first - last) * SHAPES[shape](progress)


def exposure(rates: list[float], decay: float) -> float:
    """Σ ηλ over a run: the effect of a decay on a weight under AdamW, for any length of run."""
    return sum(rates) * decay

"""Figures 4 and 6: check that attention factors are balanced, and norms at their bound.

The models are a pretrained one (LLaMA-2-7B and ViT-B/16 in the paper) or runs of our own. Of
a sweep, all runs whose exposure is nearest to a given one are checked together, by means: single
runs of a few hundred updates differ much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from pretrain.config.run import RanksConfig
from pretrain.errors import UsageError
from pretrain.offline.ranks import find_weights, measure_weights
from pretrain.offline.scatter import Scatter
from pretrain.report.load import RunData
from pretrain.report.paper.checks import Check, conclude
from pretrain.report.paper.runs import mean

_CORRELATION, _BALANCE = 0.8, 0.9


def figure(
    name: str,
    targets: Sequence[str],
    out: Path,
    family: Path | None = None,
    contrast: Sequence[str] = (),
) -> None:
    """Draw the scatter plots of the first model, write its points, check the means over all.

    Args:
        name: ``fig4`` or ``fig6``.
        targets: models that were trained alike, each as in `pretrain ranks`.
        contrast: runs without decay, whose numbers are shown for comparison.
    """
    trained = [_scatter_of(target, family) for target in targets]
    trained[0].write(out, name, Path(targets[0]).name)
    before = [_scatter_of(target) for target in contrast]
    checks = []
    for product, word, sides in (
        ("qk", "W_QK", "rows of W_Q and W_K"),
        ("vp", "W_VP", "rows of W_V and columns of P"),
    ):
        claim = f"squared norms of {sides} lie along the diagonal (correlation of logarithms)"
        correlation = partial(Scatter.correlation, panel="row", product=product)
        checks.append(_check(claim, _CORRELATION, correlation, trained, before))
        claim = f"the norms of {word} are at their bound (Σ nuclear / Σ bound)"
        balance = partial(Scatter.balance, product=product)
        checks.append(_check(claim, _BALANCE, balance, trained, before))
    conclude(name, checks, out)


def nearest_exposure(runs: Sequence[RunData], exposure: float) -> list[RunData]:
    """All runs whose exposure of attention is nearest to one; unknown exposures do not count.

    Raises:
        UsageError: if no run's exposure is known.
    """
    known = [run.exposure for run in runs if math.isfinite(run.exposure)]
    if not known:
        raise UsageError(
            f"{runs[0].path.parent}: no run has a known exposure of attention; give runs that log "
            "rate and λ, or --model"
        )
    nearest = min(known, key=lambda found: abs(found - exposure))
    return [run for run in runs if math.isclose(run.exposure, nearest, rel_tol=1e-3)]


def without_decay(runs: Sequence[RunData]) -> list[RunData]:
    """All runs whose attention was not exposed to decay."""
    return [run for run in runs if run.exposure == 0]


def _scatter_of(target: str, family: Path | None = None) -> Scatter:
    return measure_weights(find_weights(target, family)[-1:], RanksConfig())[1]


def _check(
    claim: str,
    least: float,
    figure_of: Callable[[Scatter], float],
    trained: list[Scatter],
    before: list[Scatter],
) -> Check:
    """Check that the mean of a figure, which is 1 in theory, is not below ``least``."""
    figures = [figure_of(scatter) for scatter in trained]
    value = f"{mean(figures):.3f}"
    if len(figures) > 1:
        value += f", mean of {len(figures)} runs ({min(figures):.3f} to {max(figures):.3f})"
    if before:
        value += f"; without decay {mean([figure_of(scatter) for scatter in before]):.3f}"
    return Check(claim, 1 - mean(figures), 1 - least, value)

"""Figures 4 and 6: check that attention factors of trained models are balanced, norms at the bound.

The model is a pretrained one (LLaMA-2-7B and ViT-B/16 in the paper) or one of our own runs.
"""

from __future__ import annotations

from pathlib import Path

from pretrain.config.run import RanksConfig
from pretrain.offline.ranks import find_weights, measure_weights
from pretrain.report.paper.checks import Check, conclude

_CORRELATION, _BALANCE = 0.8, 0.9


def figure(
    name: str, target: str, out: Path, family: Path | None = None, contrast: str | None = None
) -> None:
    """Draw the scatter plots, write the points, print the checks.

    Args:
        name: ``fig4`` or ``fig6``.
        target: as in `pretrain ranks`.
        contrast: a run without decay, whose numbers are shown for comparison.
    """
    _, scatter = measure_weights(find_weights(target, family)[-1:], RanksConfig())
    scatter.write(out, name, target)
    before = None
    if contrast:
        _, before = measure_weights(find_weights(contrast)[-1:], RanksConfig())
    checks = []
    for product, word, sides in (
        ("qk", "W_QK", "rows of W_Q and W_K"),
        ("vp", "W_VP", "rows of W_V and columns of P"),
    ):
        correlation = scatter.correlation("row", product)
        beside = f"; without decay {before.correlation('row', product):.3f}" if before else ""
        claim = f"squared norms of {sides} lie along the diagonal (correlation of logarithms)"
        checks.append(Check(claim, 1 - correlation, 1 - _CORRELATION, f"{correlation:.3f}{beside}"))
        share = scatter.balance(product)
        beside = f"; without decay {before.balance(product):.3f}" if before else ""
        claim = f"the norms of {word} are at their bound (Σ nuclear / Σ bound)"
        checks.append(Check(claim, 1 - share, 1 - _BALANCE, f"{share:.3f}{beside}"))
    conclude(name, checks, out)

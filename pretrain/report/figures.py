"""The figures of a report, from a study."""

from __future__ import annotations

from pretrain.report.load import Study
from pretrain.report.norm_figures import norms_if_any
from pretrain.report.rank_figures import heads, over_decay, over_training
from pretrain.report.spec import Figure
from pretrain.report.theory_figures import (
    bounds,
    discrepancy,
    row_norms_if_any,
    spectra_if_any,
)
from pretrain.report.training_figures import losses, settings


def figures_of(study: Study, band: str = "heads") -> list[Figure]:
    """Every figure for which the study's runs have data.

    Args:
        band: what bands span at first and in print (`pretrain.report.rank_figures.BANDS`).
    """
    figures = [
        over_decay(study, band),
        over_training(study, band),
        heads(study),
        discrepancy(study),
        bounds(study),
        *row_norms_if_any(study),
        *spectra_if_any(study),
        losses(study),
        settings(study),
        *norms_if_any(study),
    ]
    return figures

"""The map of heads has values in print, whatever the steps at which conditions were measured."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pretrain.report.load import Study, load_study
from pretrain.report.rank_figures import heads
from tests.fake_runs import recipe, write_run


def measured_at(folder: Path, steps: dict[float, tuple[int, ...]]) -> Study:
    """A run of each λ, measured only at some of the steps 0, 20 and 40."""
    for decay, kept in steps.items():
        values = recipe(optimizer__weight_decay__attention=decay)
        run = write_run(folder / f"{decay}", values, np.random.default_rng(0), last=max(kept))
        table = pq.read_table(run / "ranks.parquet")
        chosen = [row["step"] in kept for row in table.to_pylist()]
        pq.write_table(table.filter(chosen), run / "ranks.parquet")
    return load_study([folder], unfinished=True)


@pytest.mark.parametrize(
    ("first", "last", "step", "shown"),
    [
        ((0, 20, 40), (0, 20, 40), 40, 2),
        ((0, 20, 40), (0, 20), 20, 2),
        ((0, 20), (0, 20, 40), 20, 2),
        ((0, 40), (0, 20), 0, 2),
        ((0, 20), (40,), 40, 1),
        ((40,), (0, 20), 40, 1),
    ],
)
def test_printed_maps_have_values(
    first: tuple[int, ...], last: tuple[int, ...], step: int, shown: int, tmp_path: Path
) -> None:
    figure = heads(measured_at(tmp_path, {0.0: first, 0.5: (20,), 1.0: last}))
    assert len(figure.printed) == 2 * shown  # both products of each condition
    for panel in (*figure.printed, *figure.view(figure.default)):
        assert panel.title.endswith(f"step {step}")
        assert panel.heat and all(math.isfinite(x) for row in panel.heat.values for x in row)


def test_every_step_is_on_the_slider_and_blanks_are_explained(tmp_path: Path) -> None:
    figure = heads(measured_at(tmp_path, {0.0: (0, 40), 1.0: (0, 20)}))
    assert figure.controls[-1].options == ["0", "20", "40"]
    titles = [figure.view((condition, 0, 1))[0].title for condition in (0, 1)]
    assert titles[0].endswith("step 20 (not measured)") and titles[1].endswith("step 20")

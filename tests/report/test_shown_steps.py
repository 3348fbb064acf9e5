"""A long run in a report: few of its measurements are shown, and λ is that of all of them."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pretrain.ranks.columns import column_of
from pretrain.ranks.schema import KEYS
from pretrain.ranks.table import read_rank_columns, read_ranks
from pretrain.report.load import load_study
from pretrain.report.rank_figures import heads
from pretrain.report.read_run import load_run
from pretrain.report.sample import MOST_STEPS, shown_steps, steps_of_all
from tests.fake_runs import recipe, write_run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", range(200))
def test_shown_steps(seed: int) -> None:
    """Of any steps: few enough, in order, the ends among them; all of a short run."""
    rng = random.Random(seed)
    every = rng.choice([1, 2, 7, 20, 1000])
    count = rng.choice([1, 2, 3, MOST_STEPS - 1, MOST_STEPS, MOST_STEPS + 1, 1700, 24_889])
    if seed % 2:
        steps = [every * number for number in range(count)]
    else:  # the interval changed, or the last step is no multiple
        steps = sorted(rng.sample(range(40 * count), count))
    shown = shown_steps(steps)
    assert set(shown) <= set(steps) and shown == sorted(set(shown))
    assert (shown[0], shown[-1]) == (steps[0], steps[-1])
    assert len(shown) <= MOST_STEPS
    assert shown == steps or len(shown) >= min(count, MOST_STEPS) // 4


@pytest.mark.parametrize("seed", range(20))
def test_runs_of_a_study_show_the_same_steps(seed: int) -> None:
    """Whatever a run lacks (its beginning, its end, single steps), it shows the others where its
    neighbours do."""
    rng = random.Random(seed)
    whole = [20 * number for number in range(rng.randint(400, 9000))]
    measured = [whole]
    for _ in range(rng.randint(1, 4)):
        start, stop = rng.choice([0, 1, 300]), rng.choice([0, 7, 90])
        part = whole[start : len(whole) - stop]
        lost = set(rng.sample(part[1:-1], 3))
        measured.append([step for step in part if step not in lost])
    shown = steps_of_all(measured)
    assert len(shown) <= MOST_STEPS + 2 * len(measured)
    for steps in measured:
        own = [step for step in steps if step in shown]
        assert (own[0], own[-1]) == (steps[0], steps[-1])
        inside = {step for step in shown if steps[0] <= step <= steps[-1]}
        assert len(inside - set(own)) <= 3


def test_a_shorter_seed_makes_no_teeth(tmp_path: Path) -> None:
    """Two seeds, one of which was measured at fewer steps than are shown."""
    for number, count in enumerate((2 * MOST_STEPS + 1, MOST_STEPS - 20)):
        long_run(tmp_path / f"runs/{number}", count=count, seed=number)
    study = load_study([tmp_path / "runs"], unfinished=True)
    a, b = ({*column_of(run.ranks, "step")} for run in study.runs)
    assert {step for step in a if step <= max(b)} == b


def long_run(
    folder: Path, changes_at: int | None = None, count: int = 2 * MOST_STEPS + 1, seed: int = 0
) -> tuple[Path, int]:
    """A run with twice as many measurements as are shown, and the number of its steps."""
    run = write_run(folder, recipe(seed=seed), np.random.default_rng(0))
    table = pq.read_table(run / "ranks.parquet")
    first = table.filter(pa.compute.equal(table["step"], 0))
    pieces = []
    for step in range(count):
        piece = first.set_column(0, "step", pa.array([step] * len(first)))
        place = piece.schema.get_field_index("decay_a")
        decay = 0.25 if step == changes_at else 0.5
        pieces.append(piece.set_column(place, "decay_a", pa.array([decay] * len(first))))
    pq.write_table(pa.concat_tables(pieces), run / "ranks.parquet")
    return run, 2 * MOST_STEPS


def test_a_long_run(tmp_path: Path) -> None:
    run, last = long_run(tmp_path / "run")
    found = load_run(run)
    steps = sorted(set(column_of(found.ranks, "step")))
    assert MOST_STEPS // 2 <= len(steps) <= MOST_STEPS
    assert (steps[0], steps[-1]) == (0, last)
    rows = [row for row in read_ranks(run) if row["step"] in steps]
    assert [row["pseudo_rank"] for row in rows] == list(column_of(found.ranks, "pseudo_rank"))
    slider = heads(load_study([run], unfinished=True)).controls[-1]
    assert 50 <= len(slider.options) <= 100 and slider.options[-1] == str(last)


def test_a_decay_that_changes_where_nothing_is_shown(tmp_path: Path) -> None:
    run, _ = long_run(tmp_path / "run", changes_at=377)
    changed = load_run(run)
    assert 377 not in column_of(changed.ranks, "step")
    assert not changed.constant_decay
    assert load_run(long_run(tmp_path / "other")[0]).constant_decay


def test_some_columns_of_some_steps(trained: Path) -> None:
    rows = read_ranks(trained)
    chosen = read_rank_columns(trained, ["nuclear_norm"], lambda steps: steps[1:3])
    steps = sorted({row["step"] for row in rows})[1:3]
    assert chosen.names == [*KEYS, "nuclear_norm"]
    wanted = [row["nuclear_norm"] for row in rows if row["step"] in steps]
    assert wanted == list(chosen.column("nuclear_norm"))
    assert not read_rank_columns(trained, choose=lambda steps: [])

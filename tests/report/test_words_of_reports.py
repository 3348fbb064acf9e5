"""Natural order, long names, and words that a reader of one figure or one line needs."""

from __future__ import annotations

import io
import itertools
import random
import re
from pathlib import Path

import numpy as np
from rich.console import Console

from pretrain.cli.watched import view_of
from pretrain.report.cells import Cell, DataTable
from pretrain.report.findings import findings
from pretrain.report.interactive import _traces
from pretrain.report.load import load_study
from pretrain.report.printed import _label, _page, _pyplot
from pretrain.report.spec import Series, in_lines
from pretrain.report.tables import _short
from pretrain.report.text import _latex_table, _markdown_table
from pretrain.report.training_figures import settings
from pretrain.sweep.config import by_numbers
from tests.fake_runs import recipe, write_run, write_study

NUMBERS = (-3.0, 0.0, 1e-05, 0.5, 3.0, 10.0, 100.0, 1e6)


def test_names_are_in_the_order_of_their_numbers() -> None:
    for form in ("attention={:g}", "attention = {:g}, mlp = 2", "run {:g}"):
        names = [form.format(number) for number in NUMBERS]
        mixed = random.Random(form).sample(names, len(names))
        assert sorted(mixed, key=by_numbers) == names
    pairs = [f"a={a:g},seed={b}" for a, b in itertools.product(NUMBERS, (1, 2, 10, 11))]
    assert sorted(random.Random(1).sample(pairs, len(pairs)), key=by_numbers) == pairs
    odd = ["", "1", "a", "a1b", "a1", "²", "1e999", "1.2.3", "-", "step-00000010", "b"]
    assert len(sorted(odd, key=by_numbers)) == len(odd)  # every two can be compared


def test_watch_and_report_list_runs_in_this_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for decay, seed in itertools.product((10.0, 3.0, 0.5), (10, 2)):
        values = recipe(seed=seed, optimizer__weight_decay__attention=decay)
        write_run(tmp_path / f"runs/attention={decay:g},seed={seed}", values, rng)
    wanted = [f"attention={a},seed={b}" for a in ("0.5", "3", "10") for b in (2, 10)]
    view = view_of(tmp_path / "runs")
    view.look()
    assert list(view._views) == wanted  # type: ignore[attr-defined]
    text = io.StringIO()
    Console(file=text, width=200).print(view.draw(200, 40))
    assert re.findall(r"attention=[\d.]+,seed=\d+", text.getvalue()) == wanted


def test_conditions_of_one_exposure_are_in_this_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for value in (10.0, 3.0, 0.5):
        write_run(tmp_path / f"runs/{value}", recipe(train__z_loss=value), rng)
    names = [one.name for one in load_study([tmp_path / "runs"]).conditions]
    assert names == ["z_loss = 0.5", "z_loss = 3", "z_loss = 10"]


def test_long_names_are_whole_and_fit_their_legend() -> None:
    long = ", ".join(f"a_rather_long_key_{number} = {number / 7:.4g}" for number in range(12))
    names = [long, f"{long}1", "x" * 200, "short", f"_{long}"]
    labels = [_label(Series(name, [0.0], [1.0])) for name in names]
    assert len(set(labels)) == len(names)
    for name, label in zip(names, labels, strict=True):
        assert re.sub(r"\s", "", label) == re.sub(r"\s", "", name)
        assert max(map(len, label.splitlines())) <= 45
        trace = _traces(Series(name, [0.0], [1.0]), 0, "", True, "p")[-1]
        assert trace["name"] == "<br>".join(in_lines(name))
    assert in_lines("short") == ["short"]


def test_an_axis_says_that_its_values_are_running_means(tmp_path: Path) -> None:
    study = load_study([write_study(tmp_path / "runs", decays=(0.0, 1.0), seeds=(1, 2))])
    page = _page(_pyplot(), settings(study))
    labels = {axes.get_ylabel(): axes.get_title() for axes in page.axes}
    smooth = {label for label in labels if label.endswith(", running mean")}
    assert smooth == {"gradient norm, running mean", "tokens per second, running mean"}


def test_the_first_sentence_names_a_figure_with_each_condition(tmp_path: Path) -> None:
    study = load_study([write_study(tmp_path / "runs", decays=(0.0, 1.0), seeds=(1, 2, 3))])
    first = findings(study)[0]
    number, versus = r"\d\.\d{3}", r"\(difference is [^()]*n = 3 pairs\)"
    parts = [
        f"he mean pseudo-rank of {name} is {number} with attention = 0 and {number} with "
        f"attention = 1 {versus}"
        for name in ("W_QK", "W_VP")
    ]
    assert re.fullmatch(f"T{parts[0]}; t{parts[1]}\\.", first), first


def test_the_title_of_a_narrow_table_is_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", recipe(), np.random.default_rng(0))
    view = view_of(run)
    view.look()
    text = io.StringIO()
    Console(file=text, width=120).print(view.draw(120, 40))
    assert "pseudo-rank, mean over heads, step 40\n" in text.getvalue()


def test_columns_of_numbers_are_aligned_to_the_right() -> None:
    """The first column, and each one with a word in it, to the left."""
    rows = [["x", "GitHub", "1.5 ± 2", "[−1, 2]", ""], ["7", "2", "–", "", "−3"]]
    cells = [[Cell(text) for text in row] for row in rows]
    table = DataTable("key", "Title", "Caption", list("abcde"), cells)
    assert "| --- | --- | ---: | ---: | ---: |" in _markdown_table(table)
    assert r"\begin{tabular}{llrrr}" in _latex_table(table)


def test_headings_have_four_digits_or_those_that_tell_them_apart() -> None:
    assert _short([0.0, 1.89538, 15.1632]) == ["0", "1.895", "15.16"]
    assert _short([0.1, 0.100001, 2.0]) == ["0.1", "0.100001", "2"]

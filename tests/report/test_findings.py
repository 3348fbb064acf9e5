"""The sentences at the head of a report: their numbers are the tables', and they claim no more."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pretrain.report import write_report
from pretrain.report.findings import findings, headline
from pretrain.report.load import load_study
from pretrain.report.page import page
from tests.fake_runs import leave_pairs, recipe, write_perplexities, write_run, write_study

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("parsed_once")]


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2, 3))])
def test_numbers_are_those_of_the_tables(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    decays = tuple(float(one) for one in rng.choice([0.1, 0.5, 1, 2, 3], 3, replace=False))
    folder = write_study(tmp_path / "runs", decays=decays, seeds=tuple(range(2 + seed)), rng=rng)
    study = load_study([folder])
    ranks, held_out, limits = findings(study)
    write_report([folder], tmp_path / "csv", "csv")
    rows = list(csv.DictReader((tmp_path / "csv/differences.csv").open()))
    baseline = study.baseline.exposure
    far = max(study.conditions, key=lambda one: abs(one.exposure - baseline)).name
    for figure, text in (("rank W_QK", ranks), ("rank W_VP", ranks), ("perplexity", held_out)):
        row = next(one for one in rows if (one["figure"], one["condition"]) == (figure, far))
        interval = f"[{float(row['low']):+.4g}, {float(row['high']):+.4g}]"
        assert f"{float(row['difference']):+.4g}, 95 % interval {interval}" in text
        assert f"n = {row['pairs']} pairs" in text
    clear = [float(one["difference"]) for one in rows
             if one["figure"] == "perplexity" and one["clear"] == "True"]  # fmt: skip
    lower = sum(one < 0 for one in clear)
    told = [re.search(rf"{word} in (\d+) ", held_out) for word in ("lower", "higher")]
    assert [int(found[1]) if found else 0 for found in told] == [lower, len(clear) - lower]
    assert ("of 2 other conditions" if clear else "in any of 2 other conditions") in held_out
    unclear = len([one for one in rows if one["figure"] == "perplexity"]) - len(clear)
    assert ("little meaning" in limits) == (seed == 0)
    assert ("not shown to be equal" in limits) == (seed > 0 and unclear > 0)
    for value in decays:
        assert f"{value:g}" in headline(study)


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    study = load_study([write_study(tmp_path / "runs", decays=(0.0, 1.0), seeds=(1,))])
    ranks, held_out, limits = findings(study)
    assert "one seed: no interval" in limits and "%" not in ranks + held_out
    assert ranks.count("no interval, n = 1 pair)") == 2
    assert "could not be tested against attention = 0 (fewer than two pairs)" in held_out
    assert headline(study) == "Weight decay of attention: 0 and 1 compared"


@pytest.mark.parametrize(
    ("kinds", "told"),
    [
        (((), ("a.py:A",)), "Weight decay with and without the policy a.py:A compared"),
        (
            ((), ("a.py:A", "b.py:B")),
            "Weight decay with and without the policies a.py:A+b.py:B compared",
        ),
        ((("a.py:A",), ("b.py:B",)), "Weight decay by policy: a.py:A and b.py:B compared"),
        (
            ((), ("a.py:A",), ("b.py:B",)),
            "Weight decay by policy: a.py:A, b.py:B and none compared",
        ),
    ],
)
def test_policies_are_compared_in_words(
    kinds: tuple[tuple[str, ...], ...], told: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    for number, chosen in enumerate(kinds):
        policies = [{"kind": kind, "roles": ["query"], "sha256": "0" * 64} for kind in chosen]
        decay = {"attention": 1.0, "policies": policies}
        write_run(tmp_path / f"{number}", recipe(seed=1, optimizer__weight_decay=decay), rng)
    assert headline(load_study([tmp_path])) == told


@pytest.mark.parametrize(
    ("perplexities", "told"),
    [
        ((10.0, 9.0), "is clearly lower in 1 (attention = 1) of 1 other condition than with "
                      "attention = 0"),
        ((9.0, 10.0), "is clearly higher in 1 (attention = 1) of 1 other condition than with "
                      "attention = 0"),
        ((9.0, 9.0), "does not differ clearly from attention = 0 in any of 1 other"),
    ],
)  # fmt: skip
def test_what_did_not_happen_is_not_counted(
    perplexities: tuple[float, float], told: str, tmp_path: Path
) -> None:
    values = dict(zip((0.0, 1.0), perplexities, strict=True))
    sentence = findings(load_study([write_perplexities(tmp_path / "runs", values)]))[1]
    assert told in sentence and " in 0" not in sentence


@pytest.mark.parametrize(
    ("perplexities", "told"),
    [
        ({0.5: 9.0, 1.0: 10.0, 3.0: 10.0}, "lower in 1 (attention = 0.5) of 3"),
        ({0.5: 9.0, 1.0: 8.0, 3.0: 12.0},
         "lower in 2 (attention = 0.5; attention = 1) and higher in 1 (attention = 3) of 3"),
        ({0.5: 9.0, 1.0: 8.0, 2.0: 7.0, 3.0: 12.0}, "lower in 3 and higher in 1 of 4"),
    ],
)  # fmt: skip
def test_up_to_three_clear_conditions_are_named(
    perplexities: dict[float, float], told: str, tmp_path: Path
) -> None:
    folder = write_perplexities(tmp_path / "runs", {0.0: 10.0, **perplexities})
    sentence = findings(load_study([folder]))[1]
    assert f"is clearly {told} other conditions than with attention = 0 (p < 0.05" in sentence


def test_nothing_is_clear_with_two_pairs(tmp_path: Path) -> None:
    folder = write_perplexities(tmp_path / "runs", {0.0: 20.0, 1.0: 9.0, 3.0: 8.0}, seeds=(1, 2))
    _, held_out, limits = findings(load_study([folder]))
    words = "is not called clearly different from attention = 0 in any of 2 other conditions"
    assert f"{words} (fewer than 3 pairs); with attention = 3 the difference is -1" in held_out
    assert "95 % interval" in held_out and "little meaning" in limits


@pytest.mark.parametrize(
    ("pairs", "told"),
    [
        ((1, 1), "runs cannot say: one pair: no interval, and no difference can be told"),
        ((1, 4), "runs cannot say: one pair with attention = 1: no interval; another model"),
        ((1, 2), "one pair with attention = 1: no interval; 2 pairs of seeds: the intervals have"),
        ((0, 2), "runs cannot say: 2 pairs of seeds: the intervals have little meaning"),
    ],
)
def test_few_pairs_are_said_where_there_are_few(
    pairs: tuple[int, int], told: str, tmp_path: Path
) -> None:
    folder = write_perplexities(tmp_path / "runs", {0.0: 10.0, 1.0: 9.0, 3.0: 8.0})
    leave_pairs(folder, dict(zip((1, 3), pairs, strict=True)))
    assert told in findings(load_study([folder]))[2]


def test_one_condition_compares_nothing(tmp_path: Path) -> None:
    study = load_study([write_study(tmp_path / "runs", decays=(1.0,), seeds=(1, 2))])
    ranks, held_out, limits = findings(study)
    assert "n = 2 seeds" in ranks and "±" in held_out and "one condition" in limits


def test_runs_without_held_out_figures_or_pairs(tmp_path: Path) -> None:
    for number, decay in enumerate((0.0, 1.0)):
        values = recipe(seed=number, optimizer__weight_decay__attention=decay,
                        evaluation__at_end="none")  # fmt: skip
        write_run(tmp_path / f"runs/{number}", values, np.random.default_rng(number),
                  evaluation={"overall": None})  # fmt: skip
        (tmp_path / f"runs/{number}/evaluation.json").unlink(missing_ok=True)
    ranks, held_out, limits = findings(load_study([tmp_path / "runs"]))
    assert "not known, without a pair" in ranks and "No run has held-out figures" in held_out
    assert "nan" not in ranks + held_out + limits


def test_sentences_are_in_every_form_that_is_read(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "runs", decays=(0.0, 1.0), seeds=(1, 2))
    study = load_study([folder])
    text = page(study, [], [], [])
    assert all(sentence.replace("<", "&lt;") in text for sentence in findings(study))
    assert f"<h1>{headline(study)}</h1>" in text


def test_a_fork_shows_both_ranges(tmp_path: Path) -> None:
    """λ is of the updates after the fork, beside the exposure of these and of all."""
    values = recipe(optimizer__weight_decay__attention=2.5)
    folder = write_run(tmp_path / "runs/a", values, np.random.default_rng(0),
                       decay=lambda step: 6.0 if step < 10 else 2.5)  # fmt: skip
    table = pq.read_table(folder / "ranks.parquet")  # a fork is measured after its trunk's end
    pq.write_table(table.filter(pc.greater(table["step"], 0)), folder / "ranks.parquet")
    starts = '[{"started": "now", "forked": {"run": "trunk", "step": 10}, "versions": {}}]'
    (folder / "environment.json").write_text(starts)
    write_report([tmp_path / "runs"], tmp_path / "csv", "csv")
    (row,) = csv.DictReader((tmp_path / "csv/summary.csv").open())
    config = load_study([tmp_path / "runs"]).runs[0].config
    rates = [config.learning_rate(step) for step in range(config.train.steps)]
    own, trunk = 2.5 * sum(rates[10:]), 6.0 * sum(rates[:10])
    assert float(row["exposure since the fork"]) == pytest.approx(own)
    assert float(row["exposure Σηλ"]) == pytest.approx(own + trunk)
    assert float(row["λ"]) == pytest.approx(2.5)
    text = (tmp_path / "csv").joinpath("summary.csv").read_text()
    assert len(re.findall("since the fork", text)) == 3

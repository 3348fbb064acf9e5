"""Every number of a report's tables from the run folders alone, and the tests by other formulas."""

from __future__ import annotations

import csv
import html
import json
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from pretrain.report import write_report
from pretrain.report.tables import summary
from tests.fake_runs import STEPS, SUBSETS, recipe, write_perplexities, write_run, write_study

pytestmark = pytest.mark.usefixtures("parsed_once")

Rows = list[dict[str, str]]


def report(folder: Path, out: Path, **more: Any) -> dict[str, Rows]:
    """The report as CSV, by table."""
    write_report([folder], out, "csv", **more)
    return {path.stem: list(csv.DictReader(path.open())) for path in out.glob("*.csv")}


# --- a whole report ------------------------------------------------------------------------------


class Hand:
    """A study's figures, seed by seed, with numpy and the files alone."""

    def __init__(self, folder: Path) -> None:
        self.found: dict[float, dict[int, dict[str, float]]] = defaultdict(dict)
        for run in sorted(folder.glob("attention=*")):
            config = yaml.safe_load((run / "config.yaml").read_text())
            decay = config["optimizer"]["weight_decay"]["attention"]
            self.found[decay][config["seed"]] = self._figures(run)

    def _figures(self, run: Path) -> dict[str, float]:
        table = pq.read_table(run / "ranks.parquet").to_pylist()
        last = max(row["step"] for row in table)
        grouped = any(row["level"] == "group" for row in table)
        figures: dict[str, float] = {}
        for product in ("qk", "vp"):
            rows = [r for r in table if (r["step"], r["product"]) == (last, product)]
            heads = [r for r in rows if r["level"] == "head"]
            law = [r for r in rows if r["level"] == ("group" if grouped else "head")]
            name = product.upper()
            figures[f"rank W_{name}"] = float(np.mean([r["pseudo_rank"] for r in heads]))
            figures[f"balance {name}"] = float(np.mean([r["balance"] for r in law]))
            if product == "qk":
                pairs = [r["rope_pair_balance"] for r in law]
                figures["balance QK, rotary pairs"] = float(np.mean(pairs))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if row["kind"] == "train"]
        rates = np.array([row["learning_rate"] for row in rows])
        used = np.array([row["weight_decay"]["query"] for row in rows])
        figures["exposure Σηλ"] = float((rates * used).sum())
        figures["λ"] = float((rates * used).sum() / rates.sum())
        path = run / "evaluation.json"
        if path.exists():
            scores = json.loads(path.read_text())
            parts = {"": scores["overall"], **scores["subsets"]}
            for name, part in parts.items():
                figures[f"perplexity{name}"] = part["perplexity"]
                figures[f"bits/byte{name}"] = part["bits_per_byte"]
        return figures

    def means(self, decay: float, key: str) -> tuple[float, float, int]:
        values = [one.get(key, math.nan) for one in self.found[decay].values()]
        x = np.array([value for value in values if value is not None], dtype=float)
        x = x[np.isfinite(x)]
        error = x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
        return (float(x.mean()) if len(x) else math.nan), error, len(x)

    def gaps(self, decay: float, key: str, baseline: float) -> tuple[np.ndarray, np.ndarray]:
        both = [
            (self.found[decay][seed].get(key), self.found[baseline][seed].get(key))
            for seed in self.found[decay]
            if seed in self.found[baseline]
        ]
        kept = [(a, b) for a, b in both if a is not None and b is not None]
        kept = [(a, b) for a, b in kept if math.isfinite(a) and math.isfinite(b)]
        both_sides = np.array(kept, dtype=float).reshape(-1, 2)
        return both_sides[:, 0], both_sides[:, 1]


def number(text: str) -> float:
    return float(text) if text else math.nan


def same(text: str, value: float, rel: float = 1e-9) -> None:
    assert number(text) == pytest.approx(value, rel=rel, abs=1e-15, nan_ok=True)


def holm_of(p: list[float]) -> list[float]:
    """Holm's p by the definition, NaN left out."""
    known = sorted((value, i) for i, value in enumerate(p) if not math.isnan(value))
    found, worst = [math.nan] * len(p), 0.0
    for rank, (value, i) in enumerate(known):
        worst = max(worst, min(1.0, value * (len(known) - rank)))
        found[i] = worst
    return found


def check_study(folder: Path, tables: dict[str, Rows], decays: list[float], rotary: bool) -> None:
    """Every table of numbers against the folders."""
    hand = Hand(folder)
    columns = ["λ", "exposure Σηλ", "rank W_QK", "rank W_VP", "balance QK", "balance VP",
               "perplexity", "bits/byte", *["balance QK, rotary pairs"] * rotary]  # fmt: skip
    for row in tables["summary"]:
        decay = float(row["condition"].split("=")[1])
        for column in columns:
            mean, error, n = hand.means(decay, column)
            same(row[column], mean)
            same(row[f"{column} (standard error)"], error, 1e-6)
            assert int(row[f"{column} (seeds)"]) == n
    for table, figure in (("perplexity", "perplexity"), ("bits_per_byte", "bits/byte")):
        for row in tables[table]:
            decay = float(row["condition"].split("=")[1])
            mean, error, n = hand.means(decay, figure)
            same(row["mean"], mean)
            same(row["standard_error"], error, 1e-6)
            assert int(row["n"]) == n and float(row["lambda_attention"]) == pytest.approx(decay)
    others = [decay for decay in decays if decay != decays[0]]
    for figure in ("perplexity", "bits/byte", "rank W_QK", "rank W_VP"):
        rows = [row for row in tables["differences"] if row["figure"] == figure]
        assert len(rows) == len(others)
        check_family(hand, rows, [(d, figure) for d in others], decays[0])
    for table, figure in (
        ("subsets-perplexity", "perplexity"),
        ("subsets-bits_per_byte", "bits/byte"),
    ):
        rows = tables[table]
        assert len(rows) == len(decays) * len(SUBSETS)
        for row in rows:
            mean, error, _ = hand.means(
                float(row["condition"].split("=")[1]), figure + row["subset"]
            )
            same(row["mean"], mean)
            same(row["standard_error"], error, 1e-6)
        tested = [row for row in rows if row["condition"] != f"attention = {decays[0]:g}"]
        places = [(float(r["condition"].split("=")[1]), figure + r["subset"]) for r in tested]
        check_family(hand, tested, places, decays[0])


def check_family(hand: Hand, rows: Rows, places: list[tuple[float, str]], baseline: float) -> None:
    """Comparisons that are corrected together."""
    from scipy import stats  # a second

    ps = []
    for row, (decay, key) in zip(rows, places, strict=True):
        a, b = hand.gaps(decay, key, baseline)
        assert int(row["pairs"]) == len(a)
        same(row["difference"], float((a - b).mean()) if len(a) else math.nan, 1e-6)
        tested = len(a) > 1 and (a - b).std() > 1e-13
        ps.append(float(stats.ttest_rel(a, b).pvalue) if tested else math.nan)
        same(row["p"], ps[-1], 1e-6)
        if "low" in row:
            low, high = (
                stats.ttest_rel(a, b).confidence_interval(0.95) if tested else (math.nan,) * 2
            )
            same(row["low"], low, 1e-6)
            same(row["high"], high, 1e-6)
    for row, wanted in zip(rows, holm_of(ps), strict=True):
        same(row["p_holm"], wanted, 1e-6)
        assert row["clear"] == str(wanted < 0.05 and int(row["pairs"]) >= 3)


@pytest.mark.parametrize("seed", range(6))
def test_every_number(tmp_path: Path, seed: int) -> None:
    """Random studies: seeds, λ, schedules, grouped queries, figures that are not finite."""
    rng = np.random.default_rng(seed)
    seeds = tuple(range(1, int(rng.integers(2, 6))))
    decays = [0.0, 0.5, 2.0, 3.0][: int(rng.integers(2, 5))]
    changes: dict[str, Any] = {}
    if seed % 2:
        changes["model__dialect"] = "llama"
        changes["model__num_key_value_heads"] = 2
    for decay in decays:
        for one in seeds:
            values = recipe(seed=one, optimizer__weight_decay__attention=decay, **changes)
            odd = rng.random() < 0.15
            write_run(
                tmp_path / "runs" / f"attention={decay:g},seed={one}",
                values,
                rng,
                perplexity=[math.nan, math.inf, None][int(rng.integers(3))] if odd else None,
            )
    tables = report(tmp_path / "runs", tmp_path / "csv")
    check_study(tmp_path / "runs", tables, decays, rotary=bool(seed % 2))


# --- stars ---------------------------------------------------------------------------------------


def stars(folder: Path, out: Path) -> dict[str, int]:
    """How many stars each form of a report shows in its tables, and what CSV calls clear."""
    forms = {"html": "r.html", "md": "r.md", "latex": "r.tex", "csv": "csv"}
    for form, name in forms.items():
        write_report([folder], out / name, form)
    page = (out / "r.html").read_text()
    cells = [cell for cell in page.split("<td")[1:] if "*</td>" in cell]
    assert all("--shade" in cell for cell in cells)
    assert page.count("--shade:") == len(cells)
    text = (out / "r.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    latex = [line for line in (out / "r.tex").read_text().splitlines() if line.endswith(r"\\")]
    clear = 0
    for path in (out / "csv").glob("*.csv"):
        clear += sum(row.get("clear") == "True" for row in csv.DictReader(path.open()))
    return {
        "html": len(cells),
        "md": sum(line.count(r"\*") for line in table),
        "latex": sum(line.count("*") for line in latex),
        "csv": clear,
    }


@pytest.mark.usefixtures("undrawn")
def test_a_star_is_what_its_caption_says(tmp_path: Path) -> None:
    """None without a variance; a clear difference has one in every form."""
    quantised = tmp_path / "equal"
    rng = np.random.default_rng(0)
    for decay in (0.0, 1.0):
        for seed in (1, 2):
            values = recipe(seed=seed, optimizer__weight_decay__attention=decay)
            write_run(
                quantised / f"attention={decay:g},seed={seed}", values, rng,
                ranks=lambda row, decay=decay: row.update(pseudo_rank=0.5 - decay / 384),  # type: ignore[misc]
            )  # fmt: skip
    tables = report(quantised, tmp_path / "csv")
    rows = [row for row in tables["differences"] if row["figure"].startswith("rank")]
    assert all(number(row["difference"]) == pytest.approx(-1 / 384) for row in rows)
    assert all(row["p"] == row["p_holm"] == row["low"] == "nan" for row in rows)
    assert all(row["clear"] == "False" for row in rows)
    notes = [row["note"] for row in tables["notes"]]
    assert any("2 equal differences" in note for note in notes)
    assert any("fewer than 3 pairs" in note and "attention = 1 (2)" in note for note in notes)
    clear = write_study(tmp_path / "clear", seeds=(1, 2, 3, 4, 5), decays=(0.0, 1.0))
    for run in clear.glob("attention=1*"):
        scores = json.loads((run / "evaluation.json").read_text())
        for part in (scores["overall"], scores["subsets"]["ArXiv"]):
            part["perplexity"] += 1e4
        (run / "evaluation.json").write_text(json.dumps(scores))
    found = stars(clear, tmp_path)
    assert len(set(found.values())) == 1 and found["csv"] >= 3, found


@pytest.mark.usefixtures("undrawn")
def test_two_pairs_have_p_and_interval_but_no_star(tmp_path: Path) -> None:
    folder = write_perplexities(tmp_path / "runs", {0.0: 20.0, 1.0: 10.0}, seeds=(1, 2))
    found = stars(folder, tmp_path)
    assert set(found.values()) == {0}
    rows = list(csv.DictReader((tmp_path / "csv/differences.csv").open()))
    row = next(row for row in rows if row["figure"] == "perplexity")
    assert number(row["p_holm"]) < 0.05
    assert number(row["low"]) < number(row["difference"]) < number(row["high"])
    assert row["clear"] == "False"


# --- λ, and what a condition is ------------------------------------------------------------------


WINDOW = {"kind": "schedule", "roles": ["attention"], "shape": "window", "stop": 0.5}


def test_a_window_is_what_it_applied(tmp_path: Path) -> None:
    """λ of a schedule is the mean that was applied, and the baseline that of least exposure."""
    rng = np.random.default_rng(0)
    for seed in (1, 2):
        for name, base, policies in (
            ("window", 5.0, [WINDOW]),
            ("small", 0.1, []),
            ("big", 1.0, []),
        ):
            values = recipe(
                seed=seed,
                optimizer__weight_decay__attention=base,
                optimizer__weight_decay__policies=policies,
            )
            used = (lambda step: 5.0 * (step < STEPS / 2)) if policies else None
            write_run(tmp_path / "runs" / f"{name},seed={seed}", values, rng, decay=used)
    study = write_report([tmp_path / "runs"], tmp_path / "r.html")
    assert "attention = 0.1" in study.baseline.name
    moved = next(one.name for one in study.conditions if one.decay > 2)
    assert f"λ was moved by policies: schedule in {moved}. Values" in summary(study).caption
    alone = write_report([tmp_path / "runs/window,seed=1"], tmp_path / "one.html")
    assert "λ was moved by policies: schedule. Values" in summary(alone).caption
    runs = {run.path.name.split(",")[0]: run for run in study.runs}
    rates = [runs["window"].config.learning_rate(step) for step in range(STEPS)]
    wanted = 5.0 * sum(rates[: STEPS // 2]) / sum(rates)
    assert runs["window"].decay == pytest.approx(wanted, rel=1e-9) and wanted > 2
    assert runs["small"].decay == 0.1 and runs["big"].decay == 1.0  # as the recipe wrote it
    x = {float(row["x"]) for row in report(tmp_path / "runs", tmp_path / "csv")["rank-over-decay"]
         if row["axis"] == "λ of attention"}  # fmt: skip
    assert sorted(x) == pytest.approx([0.1, 1.0, wanted], rel=1e-6)


@pytest.mark.parametrize("coupling", ["lr", "lr2", "none", {"qk": "lr2", "attention": "none"}])
def test_applied_decay_follows_the_coupling(tmp_path: Path, coupling: Any) -> None:
    """Σ rate·λ / Σ rate with the rates that λ was multiplied by, role by role."""
    values = recipe(
        optimizer__weight_decay__default=0.004,
        optimizer__weight_decay__attention=0.004,
        optimizer__weight_decay__coupling=coupling,
        optimizer__weight_decay__policies=[{**WINDOW, "start": 0.25, "stop": 0.75}],
    )

    def used(step: int) -> float:
        return 0.004 * (10 <= step < 30)

    folder = write_run(tmp_path / "run", values, np.random.default_rng(0), decay=used)
    table = pq.read_table(folder / "ranks.parquet").to_pylist()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    from pretrain.config.recipe import parse_config

    eta, peak = parse_config(config).learning_rate, config["optimizer"]["learning_rate"]
    forms: dict[str, Callable[[int], float]] = {
        "lr": eta,
        "lr2": lambda s: eta(s) ** 2 / peak,
        "none": lambda s: 1.0,
    }
    words = coupling if isinstance(coupling, dict) else {"qk": coupling, "attention": coupling}
    sums = []
    for product, word in (("qk", words["qk"]), ("vp", words["attention"])):
        for row in table:
            if row["product"] == product:
                taken = sum(forms[word](s) * used(s) for s in range(row["step"]))
                row |= {"exposure_a": taken, "exposure_b": taken}
        sums.append(sum(forms[word](s) for s in range(STEPS)))
    import pyarrow as pa

    pq.write_table(pa.Table.from_pylist(table), folder / "ranks.parquet")
    from pretrain.report.load import load_run

    run = load_run(folder)
    assert run.decay == pytest.approx(2 * run.exposure / sum(sums), rel=1e-9)


@pytest.mark.usefixtures("small_figures")
def test_what_is_not_finite_is_left_out_and_said(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "runs", seeds=(1, 2, 3))
    odd = folder / "attention=3,seed=2"
    scores = json.loads((odd / "evaluation.json").read_text())
    for bad in (math.nan, math.inf, None):  # NaN as older files have it, null as JSON has it
        scores["overall"]["perplexity"] = bad
        (odd / "evaluation.json").write_text(json.dumps(scores))
        tables = report(folder, tmp_path / "csv")
        row = next(r for r in tables["summary"] if r["condition"] == "attention = 3")
        assert math.isfinite(float(row["perplexity"])) and row["perplexity (seeds)"] == "2"
        row = next(r for r in tables["differences"]
                   if (r["condition"], r["figure"]) == ("attention = 3", "perplexity"))  # fmt: skip
        assert row["pairs"] == "2" and math.isfinite(float(row["p_holm"]))
        notes = [row["note"] for row in tables["notes"]]
        assert any("left out of perplexity" in note and str(odd) in note for note in notes)
    for name in ("r.html", "r.md"):
        write_report([folder], tmp_path / name, name.rpartition(".")[2])
        assert "left out of perplexity" in html.unescape((tmp_path / name).read_text())


def test_a_comparison_without_p_is_said(tmp_path: Path) -> None:
    """Holm's correction says how many comparisons it counts."""
    folder = write_study(tmp_path / "runs", seeds=(1, 2, 3), decays=(0.0, 1.0, 2.0, 3.0))
    for seed in (1, 2):
        path = folder / f"attention=3,seed={seed}" / "evaluation.json"
        scores = json.loads(path.read_text())
        scores["overall"]["bits_per_byte"] = math.nan
        path.write_text(json.dumps(scores))
    notes = [row["note"] for row in report(folder, tmp_path / "csv")["notes"]]
    (note,) = (note for note in notes if "Holm" in note)
    assert note.startswith("bits/byte: no p for attention = 3") and "2 of 3" in note

"""The figure of norms shows what `metrics.jsonl` has, over layers and seeds."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from pretrain.errors import RunError
from pretrain.report import write_report
from pretrain.report.figures import figures_of
from pretrain.report.load import load_study
from pretrain.report.norm_figures import norms_if_any
from pretrain.report.read_run import load_run
from pretrain.report.spec import Figure
from tests.fake_runs import write_study

pytestmark = pytest.mark.usefixtures("parsed_once")

ROLES = ("query", "key", "value", "attention_output", "mlp_in", "mlp_out", "embedding", "norm")


def line(rng: random.Random, step: int, layers: int = 3) -> dict[str, Any]:
    """A line as training writes it."""
    names = [f"layer_{k:02d}" for k in range(layers)]
    places = {role: ["outside"] if role == "embedding" else names for role in ROLES}
    kinds = {
        kind: {role: {place: rng.random() for place in places[role]} for role in ROLES}
        for kind in ("weights", "gradients", "updates")
    }
    logits = {f"layer_{k:02d}": 20 * rng.random() for k in range(layers)}
    return {"kind": "norms", "step": step, **kinds, "largest_logit": logits, "seconds": 0.1}


def add(run: Path, lines: list[dict[str, Any]]) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(one) + "\n" for one in lines)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(tmp_path / "study", decays=(0.0, 1.0), seeds=(1, 2))


def values(figure: Figure) -> dict[tuple[str, str, str, float], float]:
    """Every value: by quantity, panel, condition and step."""
    (control,) = figure.controls
    return {
        (option, panel.title, series.name, x): y
        for index, option in enumerate(control.options)
        for panel in figure.view((index,))
        for series in panel.series
        for x, y in zip(series.x, series.y, strict=True)
    }


def test_every_value(study: Path) -> None:
    rng, logged = random.Random(0), {}
    for run in sorted(study.glob("*=*")):
        logged[run.name] = [line(rng, step) for step in (10, 20, 40)]
        add(run, logged[run.name])
    (figure,) = norms_if_any(load_study([study]))
    found = values(figure)
    wanted = {}
    for decay in (0, 1):
        seeds = [logged[f"attention={decay},seed={seed}"] for seed in (1, 2)]
        for rows in zip(*seeds, strict=True):
            where = (f"attention = {decay}", float(rows[0]["step"]))
            for kind in ("weights", "gradients", "updates"):
                for role in ROLES[:-1]:
                    both = [sum(x * x for x in row[kind][role].values()) ** 0.5 for row in rows]
                    wanted[(kind, role.replace("_", " "), *where)] = sum(both) / 2
            both = [max(row["largest_logit"].values()) for row in rows]
            wanted[("largest attention logit", "all layers", *where)] = sum(both) / 2
    assert found == pytest.approx(wanted)


@pytest.mark.usefixtures("small_figures")
def test_runs_that_have_some_or_none(study: Path, tmp_path: Path) -> None:
    """Nothing is drawn for what was not logged; what was not finite is a gap."""
    assert norms_if_any(load_study([study])) == []
    row = line(random.Random(1), 20)
    del row["largest_logit"], row["updates"]
    row["weights"]["query"]["layer_01"] = None
    add(study / "attention=1,seed=2", [row])
    found = load_study([study])
    assert [figure.key for figure in figures_of(found)][-1] == "norms"
    shown = values(norms_if_any(found)[0])
    assert {key[0] for key in shown} == {"weights", "gradients"}
    assert {key[2] for key in shown} == {"attention = 1"}
    assert math.isnan(shown["weights", "query", "attention = 1", 20.0])
    assert shown["weights", "key", "attention = 1", 20.0] == pytest.approx(
        math.dist([0, 0, 0], list(row["weights"]["key"].values()))
    )
    for form in ("html", "md", "csv"):
        write_report([study], tmp_path / form, form)
    assert "Norms by role" in (tmp_path / "html").read_text()
    csv = (tmp_path / "csv" / "norms.csv").read_text().splitlines()
    assert csv[0].startswith("quantity,panel,series,x,y") and "gradients,mlp in," in "".join(csv)


@pytest.mark.parametrize("wrong", [[], 3, "x", {"query": 3}, {"query": {"layer_00": "x"}},
                                   {"query": {"layer_00": True}},
                                   {"query": {"layer_00": 10**400}}])  # fmt: skip
@pytest.mark.parametrize("key", ["weights", "updates", "largest_logit"])
def test_a_line_of_another_shape_is_named(study: Path, key: str, wrong: Any) -> None:
    run = study / "attention=0,seed=1"
    number = len((run / "metrics.jsonl").read_text().splitlines()) + 1
    value = wrong.get("query", 3) if key == "largest_logit" and isinstance(wrong, dict) else wrong
    add(run, [{**line(random.Random(2), 20), key: value}])
    with pytest.raises(RunError, match=rf"metrics.jsonl:{number}: damaged \({key}"):
        load_run(run)

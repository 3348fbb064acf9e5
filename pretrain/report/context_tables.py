"""The tables beside the figures: recipes, data, machines, and what is left out."""

from __future__ import annotations

import json
from typing import Any

from pretrain.report.cells import Cell, DataTable
from pretrain.report.load import Study
from pretrain.report.varying import NO_EFFECT, meant, varying


def configuration(study: Study) -> list[DataTable]:
    """The keys in which the runs' recipes differ."""
    runs = study.runs
    sections = tuple(type(runs[0].config).model_fields)
    keys = varying(runs, sections)
    if not keys:
        return []
    rows = [[Cell(run.path.name), *(Cell(_short(meant(run, key))) for key in keys)] for run in runs]
    raw = [{"run": run.path.name, **{key: meant(run, key) for key in keys}} for run in runs]
    caption = (
        f"Keys whose values are not the same in all runs. {NO_EFFECT}: it has no effect there."
    )
    return [DataTable("configuration", "What differs", caption, ["run", *keys], rows, raw)]


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, dict | list) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def environment(study: Study) -> DataTable:
    """Machine and versions, with the number of runs that had each."""
    counts: dict[str, dict[str, int]] = {}
    for run in study.runs:
        flat = {
            k: v for k, v in run.environment.items() if k not in ("started", "versions", "data")
        }
        flat |= run.environment.get("versions", {})
        for key, value in flat.items():
            part = counts.setdefault(key, {})
            text = "–" if value is None else str(value)
            part[text] = part.get(text, 0) + 1
    rows = [
        [Cell(key), Cell("; ".join(v if n == len(study.runs) else f"{v} ({n} runs)"
                                    for v, n in values.items()))]
        for key, values in counts.items()
    ]  # fmt: skip
    raw = [
        {"what": key, "value": v, "runs": n}
        for key, part in counts.items()
        for v, n in part.items()
    ]
    caption = "Of each run's last start."
    return DataTable("environment", "Environment", caption, ["", ""], rows, raw)


def data_seen(study: Study) -> list[DataTable]:
    """Tokens and epochs of every subset, for each group of runs that use the same."""
    groups: dict[str, list[str]] = {}
    for condition in study.conditions:
        for run in condition.runs:
            data = run.environment.get("data")
            if data and data["subsets"]:
                names = groups.setdefault(json.dumps(data), [])
                names += [condition.name] if condition.name not in names else []
    rows, raw = [], []
    for text, names in groups.items():
        data = json.loads(text)
        group_name = "all runs" if len(groups) == 1 else "; ".join(names)
        for subset, use in data["subsets"].items():
            figures = [f"{int(use[key]):,}" for key in ("corpus", "seen")]
            cells = [group_name, subset, data["unit"], *figures, f"{use['epochs']:.3g}"]
            rows.append([Cell(cell) for cell in cells])
            raw.append({"conditions": group_name, "subset": subset, "unit": data["unit"], **use})
    if not rows:
        return []
    caption = (
        "Training data by subset: the amount in the data, the amount that a run sees (repetitions "
        "counted), and the number of epochs."
    )
    head = ["conditions", "subset", "unit", "in the data", "seen", "epochs"]
    return [DataTable("data", "Data", caption, head, rows, raw)]


def notes_table(notes: list[str]) -> DataTable:
    """What was left out, not paired or not tested, with the reason: one row each."""
    return DataTable(
        "notes",
        "Left out and not compared",
        "Every run, figure and comparison that is not in the tables and figures, with the reason.",
        ["note"],
        [[Cell(note)] for note in notes],
        [{"note": note} for note in notes],
    )

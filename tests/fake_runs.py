"""Run folders written by hand: what a report reads, without any training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pretrain.config.recipe import Config, dump_config, parse_config
from tests.tools import base_recipe

STEPS = 40
MEASURED = (0, 20, 40)
SUBSETS = ("ArXiv", "Github", "Wikipedia (en)")


def recipe(**changes: Any) -> dict[str, Any]:
    """The base recipe with values at dotted keys (``__`` for the dots)."""
    values = deepcopy(base_recipe(Path("/nowhere")))
    values["train"]["steps"] = STEPS
    values["evaluation"]["at_end"] = "all"
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    return values


def write_run(
    folder: Path,
    values: dict[str, Any],
    rng: np.random.Generator,
    *,
    decay: Callable[[int], float] | None = None,
    evaluation: dict[str, Any] | None = None,
    ranks: Callable[[dict[str, Any]], None] | None = None,
    perplexity: float | None = None,
    subsets: tuple[str, ...] = SUBSETS,
    events: tuple[dict[str, Any], ...] = (),
    precision: str = "fp32",
    identity: dict[str, str] | None = None,
    last: int = STEPS,
) -> Path:
    """A finished run's folder with random figures.

    Args:
        decay: λ of attention in update number ``step``; default: the recipe's.
        evaluation: over the keys of evaluation.json; None there takes the file away.
        ranks: changes each row of the rank table.
        last: the last step that was logged and measured.
    """
    config = parse_config(values)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    base = float(config.optimizer.weight_decay.attention or 0.0)
    used = [decay(step) if decay else base for step in range(config.train.steps)]
    rates = [config.learning_rate(step) for step in range(config.train.steps)]
    _metrics(folder, config, used, rates, rng, events, last)
    rows = _ranks(config, used, rates, rng, [step for step in MEASURED if step <= last])
    for row in rows:
        if ranks:
            ranks(row)
    with (folder / "ranks.parquet").open("wb") as file:
        pq.write_table(pa.Table.from_pylist(rows), file)
    scores = _evaluation(config, rng, perplexity, precision, subsets)
    scores |= evaluation or {}
    if None not in (evaluation or {}).values():
        (folder / "evaluation.json").write_text(json.dumps(scores))
    hashes = {"initial_weights": f"w{config.seed}", "data_order": f"o{config.seed}"}
    hashes |= {"data": "d", "tokenizer": "t", **(identity or {})}
    (folder / "identity.json").write_text(json.dumps(hashes))
    starts = [{"started": "now", "gpu": None, "precision": precision, "versions": {"torch": "2"}}]
    (folder / "environment.json").write_text(json.dumps(starts))
    return folder


def _metrics(
    folder: Path,
    config: Config,
    used: list[float],
    rates: list[float],
    rng: np.random.Generator,
    events: tuple[dict[str, Any], ...],
    last: int,
) -> None:
    mlp = config.optimizer.weight_decay.mlp
    mlp = config.optimizer.weight_decay.default if mlp is None else mlp
    skipped = {event["step"] for event in events if "skipped" in event["message"]}
    lines: list[dict[str, Any]] = [{"kind": "event", **event} for event in events]
    for step in range(1, last + 1):
        if step in skipped:
            continue
        lines.append(
            {
                "kind": "train",
                "step": step,
                "loss": float(rng.normal(5, 1)),
                "learning_rate": rates[step - 1],
                "grad_norm": 1.0,
                "tokens_per_second": 1e3,
                "weight_decay": {"query": used[step - 1], "mlp_in": mlp, "mlp_out": mlp},
            }
        )
    lines.append({"kind": "evaluation", "step": last, "loss": 5.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _ranks(
    config: Config,
    used: list[float],
    rates: list[float],
    rng: np.random.Generator,
    steps: list[int],
) -> list[dict[str, Any]]:
    model = config.model
    group = model.num_attention_heads // model.key_value_heads
    levels = [("head", model.num_attention_heads)]
    levels += [("group", model.key_value_heads)] if group > 1 else []
    rows = []
    for step in steps:
        exposure = math.fsum(r * d for r, d in zip(rates[:step], used[:step], strict=True))
        left = math.prod(1 - r * d for r, d in zip(rates[:step], used[:step], strict=True))
        books = {"decay": used[max(0, step - 1)], "exposure": exposure, "retention": left}
        for layer in range(model.num_layers):
            for product in ("qk", "vp"):
                for level, count in levels:
                    for head in range(count):
                        bound = float(rng.uniform(1, 2))
                        balance = float(rng.uniform(0.5, 1))
                        row = {
                            "step": step, "tokens": step, "layer": layer, "product": product,
                            "level": level, "head": head, "nonfinite": False,
                            "pseudo_rank": float(rng.integers(1, 17)) / 16,
                            "nuclear_norm": bound * balance, "frobenius_bound": bound,
                            "balance": balance, "discrepancy": float(rng.uniform(0.1, 1)),
                            "rope_pair_balance": float(rng.uniform(0.5, 1)),
                            "rope_pair_discrepancy": float(rng.uniform(0.1, 1)),
                        }  # fmt: skip
                        for key, value in books.items():
                            row |= {f"{key}_a": value, f"{key}_b": value}
                        rows.append(row)
    return rows


def _evaluation(
    config: Config,
    rng: np.random.Generator,
    perplexity: float | None,
    precision: str,
    subsets: tuple[str, ...],
) -> dict[str, Any]:
    def figures() -> dict[str, float]:
        loss = float(rng.uniform(4, 6))
        return {
            "documents": 3,
            "tokens": 10,
            "bytes": 40,
            "loss": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": loss / 4 / math.log(2),
        }

    overall = figures()
    if perplexity is not None:
        overall["perplexity"] = perplexity
    return {
        "split": "test",
        "step": config.train.steps,
        "data": "/nowhere",
        "precision": precision,
        "context": config.model.context,
        "stride": config.model.context,
        "overall": overall,
        "subsets": {name: figures() for name in subsets},
        "documents_sha256": "ab" * 32,
    }


def write_study(
    folder: Path,
    decays: tuple[float, ...] = (0.0, 1.0, 3.0),
    seeds: tuple[int, ...] = (1, 2, 3),
    rng: np.random.Generator | None = None,
    **more: Any,
) -> Path:
    """λ of attention x seeds, with the sweep's own file."""
    rng = rng or np.random.default_rng(0)
    names = []
    for decay in decays:
        for seed in seeds:
            name = f"attention={decay:g},seed={seed}"
            values = recipe(seed=seed, optimizer__weight_decay__attention=decay)
            write_run(folder / name, values, rng, **more)
            names.append(name)
    plan = {
        "name": "fake",
        "baseline": f"attention={decays[0]:g}",
        "runs": {name: {} for name in names},
    }
    (folder / "sweep.json").write_text(json.dumps(plan))
    return folder


def write_perplexities(
    folder: Path, perplexities: dict[float, float], seeds: tuple[int, ...] = (1, 2, 3, 4)
) -> Path:
    """λ of attention x seeds, with a given perplexity at each λ, up to a little noise."""
    rng = np.random.default_rng(0)
    for decay, perplexity in perplexities.items():
        for seed in seeds:
            values = recipe(seed=seed, optimizer__weight_decay__attention=decay)
            noisy = perplexity + 0.01 * float(rng.normal())
            write_run(folder / f"attention={decay:g},seed={seed}", values, rng, perplexity=noisy)
    return folder


def leave_pairs(folder: Path, pairs: dict[int, int], seeds: int = 4) -> None:
    """Leave so many runs of each λ that pair with the baseline; the others begin elsewhere."""
    for decay, count in pairs.items():
        for seed in range(count + 1, seeds + 1):
            path = folder / f"attention={decay},seed={seed}" / "identity.json"
            hashes = json.loads(path.read_text())
            path.write_text(json.dumps({**hashes, "initial_weights": "others"}))

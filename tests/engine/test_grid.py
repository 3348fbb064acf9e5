"""Every grid, switch and ZeRO stage that is not refused gives the numbers of one process.

The matrix is generated: all combinations of `AXES`, less those that the recipe refuses or that
are another one under a second name. The normal suite runs a few of them that together hold every
pair of settings that occurs at all; `--long` runs all.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.config.recipe import parse_config
from pretrain.errors import UsageError
from tests.tools import (
    DIALECTS,
    base_recipe,
    by_form,
    check_theory,
    losses_of,
    metrics_of,
    run_workers,
    spectra_of,
)

STEPS = by_form(4, 10)
MODELS = DIALECTS | {
    "qk_norm": {"dialect": "llama", "num_key_value_heads": 1, "qk_norm": True, "tied_head": True},
}
"""The dialects, and what none of them has: norms of heads, a tied head without positions, and a
key/value head that tensor-parallel processes share."""
AXES = {
    "model": tuple(MODELS),
    "precision": ("fp32", "bf16"),
    "tensor": (1, 2),
    "pipeline": (1, 2),
    "data": (1, 2),
    "sequence": (False, True),
    "recompute": (False, True),
    "stage": (0, 1, 2, 3),
}
BOUNDS = {
    # relative: loss, gradient norm, singular values by the largest, evaluation
    "fp32": (5e-6, 2e-5, 2e-5, 5e-6),
    "bf16": (5e-4, 3e-2, 1e-2, 5e-4),
}
EPSILON = {"bf16": 1e-3, "qk_norm": 1e-5}
"""Adam's, by precision or model. With 1e-8 it makes a step of full size of an element that is all
rounding. In bf16, single heads then move by 6 % when one process takes another micro batch or
another kernel. With norms of queries and keys, the loss does not depend on their length, and a
gradient has no other part in that direction."""
FIGURES = ("loss", "gradient norm", "singular values", "evaluation")


@dataclass(frozen=True)
class Case:
    """One point of the matrix."""

    model: str
    precision: str
    tensor: int
    pipeline: int
    data: int
    sequence: bool
    recompute: bool
    stage: int
    attention: str = "across"

    @property
    def processes(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in asdict(self).values())

    def recipe(self, data: Path) -> dict[str, Any]:
        values = deepcopy(base_recipe(data))
        values["model"] |= MODELS[self.model]
        # Two micro batches for each rank, and four for a pipeline, which must be full once.
        micro = 2 if self.pipeline > 1 or self.data > 1 else 4
        values["train"] = {"steps": STEPS, "global_batch": 8, "micro_batch": micro}
        values["precision"] = self.precision
        if epsilon := EPSILON.get(self.precision) or EPSILON.get(self.model):
            values["optimizer"]["epsilon"] = epsilon
        values["optimizer"]["learning_rate"] = 5e-3
        values["ranks"]["every"] = STEPS // 2
        values["checkpoint"]["every"] = STEPS
        values["evaluation"]["every"] = 2 * STEPS  # that of the end is compared
        values["data"]["attention"] = self.attention
        if self.attention == "within":  # what is added to the loss goes the same ways
            values["train"]["z_loss"], values["model"]["logit_softcap"] = 1e-3, 4.0
        values["grid"] = {
            "tensor_parallel": self.tensor,
            "pipeline_parallel": self.pipeline,
            "sequence_parallel": self.sequence,
            "activation_checkpointing": self.recompute,
            "zero_stage": self.stage,
        }
        return values


def reference_of(case: Case) -> Case:
    """The same recipe on one process."""
    stage = 0 if case.precision == "fp32" else 1
    return Case(case.model, case.precision, 1, 1, 1, False, False, stage, case.attention)


def matrix() -> list[Case]:
    """Every combination that is not refused; without tensor parallelism there is no sequence
    parallelism."""
    return [case for case in (Case(*row) for row in itertools.product(*AXES.values()))  # type: ignore[arg-type]
            if (case.tensor > 1 or not case.sequence) and accepted(case)]  # fmt: skip


def accepted(case: Case) -> bool:
    try:
        parse_config(case.recipe(Path("data")))
    except UsageError:
        return False
    return True


def pairs(case: Case) -> set[tuple[Any, ...]]:
    """What a sample must hold: pairs of settings, and each grid as a whole."""
    grid = ("grid", case.tensor, case.pipeline, case.data, case.sequence)
    return {*itertools.combinations(asdict(case).items(), 2), grid}


def covering(cases: list[Case]) -> list[Case]:
    """A few of them, in which everything occurs that occurs in any (greedy)."""
    missing = set().union(*map(pairs, cases))
    found = []
    while missing:
        best = max(cases, key=lambda case: (len(pairs(case) & missing), -case.processes))
        missing -= pairs(best)
        found.append(best)
    return found


def inside_documents(model: str) -> list[Case]:
    """Grids on which the places of documents go separate ways."""
    switches = [  # tensor, pipeline, data, sequence, recompute, stage
        (2, 1, 1, True, False, 1),
        (1, 2, 1, False, True, 0),
        (1, 1, 2, False, True, 3),
    ]
    return [Case(model, "fp32", *one, "within") for one in switches]


def sample() -> list[Case]:
    """As few grids as hold all pairs of settings, and two inside documents."""
    small = [case for case in matrix() if case.processes <= 4]
    return covering(small) + inside_documents("llama")[:2]


def train(cases: list[Case], data: Path, folder: Path) -> dict[Case, Path]:
    """A run folder for each case and for its reference."""
    wanted = list(dict.fromkeys([*map(reference_of, cases), *cases]))
    for processes in (1, 2, 4, 8):
        requests = [
            {"recipe": case.recipe(data), "run": str(folder / case.name)}
            for case in wanted
            if case.processes == processes
        ]
        for start in range(0, len(requests), 10):
            part = requests[start : start + 10]
            run_workers(processes, "train", part, folder / f"workers-{processes}-{start}")
    return {case: folder / case.name for case in wanted}


def figures_of(run: Path) -> dict[str, Any]:
    evaluation = json.loads((run / "evaluation.json").read_text())
    rows = [*evaluation["subsets"].items(), ("all", evaluation["overall"])]
    return {
        "loss": losses_of(run),
        "norm": np.array([row["grad_norm"] for row in metrics_of(run) if row["kind"] == "train"]),
        "spectra": spectra_of(run),
        "documents": (evaluation["documents_sha256"], [name for name, _ in rows]),
        "evaluation": np.array([[row["loss"], row["bits_per_byte"]] for _, row in rows]),
    }


def deviations(found: dict[str, Any], wanted: dict[str, Any]) -> Iterator[float]:
    """Of each figure, relative to the run on one process."""
    assert found["documents"] == wanted["documents"]
    assert found["spectra"].keys() == wanted["spectra"].keys()
    for figure in ("loss", "norm"):
        assert len(found[figure]) == STEPS
        yield np.abs(found[figure] / wanted[figure] - 1).max()
    yield max(
        np.abs(found["spectra"][head] - sigma).max() / sigma[0]
        for head, sigma in wanted["spectra"].items()
    )
    yield np.abs(found["evaluation"] / wanted["evaluation"] - 1).max()


def compare(runs: dict[Case, Path]) -> None:
    """Print the largest deviation of each figure, and name the grids that are beyond a bound."""
    read = {case: figures_of(run) for case, run in runs.items()}
    worst: dict[str, tuple[float, ...]] = {}
    wrong = []
    for case in runs:
        wanted = read[reference_of(case)]
        assert wanted["loss"][-1] < wanted["loss"][0] - 0.05 * STEPS
        far = tuple(deviations(read[case], wanted))
        worst[case.precision] = tuple(map(max, far, worst.get(case.precision, (0.0,) * 4)))
        if any(one > bound for one, bound in zip(far, BOUNDS[case.precision], strict=True)):
            wrong.append((case.name, *(f"{one:.1e}" for one in far)))
    for precision, far in worst.items():
        shown = ", ".join(f"{name} {one:.1e}" for name, one in zip(FIGURES, far, strict=True))
        print(f"{sum(case.precision == precision for case in runs)} grids in {precision}: {shown}")
    assert not wrong, wrong


@pytest.fixture(scope="module")
def sampled(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Path]:
    """The run folders of the sample."""
    return train(sample(), data, tmp_path_factory.mktemp("grids"))


@pytest.mark.slow
def test_same_numbers_on_every_grid(sampled: dict[Case, Path]) -> None:
    axes = {(case.tensor, case.pipeline, case.data) for case in sampled if case.processes <= 4}
    assert len(axes) == 7  # all of up to two axes
    assert any(case.pipeline > 1 and case.sequence for case in sampled)
    compare(sampled)


@pytest.mark.slow
def test_every_head_once_and_within_theory(sampled: dict[Case, Path]) -> None:
    total = 0
    for case, run in sampled.items():
        rows = check_theory(run)
        groups = MODELS[case.model].get("num_key_value_heads", 0)
        assert rows == 3 * 2 * (2 * 4 + 2 * groups)  # moments, products; heads and groups
        total += rows
    assert total > 600


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
def test_inside_documents_of_every_model(model: str, data: Path, tmp_path: Path) -> None:
    cases = inside_documents(model)
    cases += [replace(case, precision="bf16", stage=max(1, case.stage)) for case in cases]
    cases.append(Case(model, "fp32", 2, 2, 1, True, True, 1, "within"))
    compare(train(cases, data, tmp_path))


@pytest.mark.long
@pytest.mark.parametrize("pipeline", AXES["pipeline"])
@pytest.mark.parametrize("tensor", AXES["tensor"])
@pytest.mark.parametrize("precision", AXES["precision"])
@pytest.mark.parametrize("model", MODELS)
def test_the_whole_matrix(
    data: Path, tmp_path: Path, model: str, precision: str, tensor: int, pipeline: int
) -> None:
    """The rest of the matrix, in parts that each have a reference of their own."""
    wanted = (model, precision, tensor, pipeline)
    part = [
        case
        for case in matrix()
        if (case.model, case.precision, case.tensor, case.pipeline) == wanted
    ]
    compare(train(part, data, tmp_path))

"""λ as the optimizer applies it: with zero gradients every tensor is Π(1 − ηλ) times its start."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from models.roles import ATTENTION, MLP, Role
from tests.tools import base_recipe, metrics_of, pretrain, run_workers, write_recipe

LAMBDAS = {"default": 0.2, "attention": 0.7, "mlp": 0.1, "head": 0.05, "bias": 0.3}


def decays(values: dict[str, float]) -> dict[str, float]:
    """λ by role, worked out by hand from the recipe's words."""
    found = {role.value: values["default"] for role in Role}
    found |= {role.value: values["attention"] for role in ATTENTION}
    found |= {role.value: values.get("mlp", values["default"]) for role in MLP}
    found |= {"norm": 0.0, "head": values.get("head", values["default"])}
    found |= {"bias": values.get("bias", 0.0)}
    return found


def case(
    data: Path, grid: tuple[int, int, int], precision: str, values: dict[str, float], **more: object
) -> dict[str, Any]:
    recipe = deepcopy(base_recipe(data))
    # Untied: the first stage alone has the embedding, the last alone the head.
    recipe["model"] |= {"dialect": "gpt_neox"}
    recipe["train"] = {"steps": 10, "global_batch": 8}
    recipe["precision"] = precision
    recipe["optimizer"]["weight_decay"] = dict(values)
    tensor, pipeline, stage = grid
    recipe["grid"] = {
        "tensor_parallel": tensor,
        "pipeline_parallel": pipeline,
        "zero_stage": stage,
    }
    return {"recipe": recipe, "decays": decays(values), **more}


CASES = {
    1: [((1, 1, stage), "fp32") for stage in (0, 1, 2, 3)]
    + [((1, 1, stage), "bf16") for stage in (1, 2, 3)],
    2: [((1, 1, stage), "fp32") for stage in (0, 1, 2, 3)]
    + [((1, 2, stage), "fp32") for stage in (0, 1)]
    + [((2, 1, 2), "bf16"), ((1, 2, 1), "bf16"), ((1, 1, 3), "bf16")],
    4: [((2, 2, 0), "fp32"), ((2, 2, 1), "fp32"), ((2, 2, 1), "bf16")],
}


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that was trained with other λ than any test asks for."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = case(data, (1, 1, 1), "fp32", {"default": 0.9, "attention": 0.0, "mlp": 0.4})["recipe"]
    recipe["train"]["steps"] = 3
    run_workers(1, "train", [{"recipe": recipe, "run": str(folder / "run")}], folder / "w")
    return folder / "run" / "checkpoints" / "step-00000003"


@pytest.mark.slow
@pytest.mark.parametrize("processes", CASES)
def test_zero_gradients(
    data: Path, trained: Path, tmp_path: Path, processes: int, request: pytest.FixtureRequest
) -> None:
    """From first values, and from a checkpoint of another λ."""
    everything = request.config.getoption("--long")
    first = CASES[processes][:: 1 if everything else 4]
    cases = [case(data, grid, precision, LAMBDAS) for grid, precision in first]
    cases += [
        case(data, grid, precision, LAMBDAS, checkpoint=str(trained))
        for grid, precision in CASES[processes][:: 1 if everything else 2]
    ]
    answers = run_workers(processes, "decay", cases, tmp_path)
    for one, answer in zip(cases, answers, strict=True):
        assert answer["worst"] < 1e-6, (one["recipe"]["grid"], one["recipe"]["precision"], answer)
        if one["recipe"]["grid"]["pipeline_parallel"] > 1:
            # Stages really lack kinds of parameters: their optimizers hold fewer groups.
            everywhere = 10
            assert all(count < everywhere for count in answer["groups"]), answer


RATES = (3e-3, 1e-2, 2e-2, 1e-2, 5e-3)
"""Of the five steps that the worker takes; the recipe's peak is 3e-3."""
HOOKED: list[tuple[dict[str, Any], list[float]]] = [
    ({"coupling": {"attention": "lr2"}}, [rate**2 / 3e-3 for rate in RATES]),
    ({"form": {"attention": "cautious"}}, list(RATES)),  # no update: it agrees with everything
    ({"form": {"attention": "adadecay"}}, list(RATES)),  # no gradient: all weigh the same
    (
        {"policies": [{"kind": "schedule", "roles": ["attention"], "start": 1, "stop": 3}]},
        [RATES[0], RATES[1], 0.5 * RATES[2], 0.0, 0.0],
    ),
]
"""Decay that is not AdamW's own, and the rates that it amounts to for attention."""


@pytest.mark.slow
@pytest.mark.parametrize("processes", CASES)
def test_zero_gradients_with_policies(
    data: Path, tmp_path: Path, processes: int, request: pytest.FixtureRequest
) -> None:
    """In the short form, on the grids on which `test_zero_gradients` has no checkpoint."""
    cases = []
    for index, (grid, precision) in enumerate(CASES[processes]):
        if index % 2 == 0 and not request.config.getoption("--long"):
            continue
        # The odd ones alone meet each kind, too.
        decay, rates = HOOKED[(index // 2 + index) % len(HOOKED)]
        one = case(data, grid, precision, LAMBDAS, rates={role.value: rates for role in ATTENTION})
        one["recipe"]["optimizer"]["weight_decay"] |= decay
        cases.append(one)
    for one, answer in zip(cases, run_workers(processes, "decay", cases, tmp_path), strict=True):
        assert answer["worst"] < 1e-6, (one["recipe"], answer)


@pytest.mark.slow
def test_resume_and_fork_with_another_decay(data: Path, tmp_path: Path) -> None:
    values = base_recipe(data)
    recipe = write_recipe(tmp_path / "r.yaml", values)
    run = tmp_path / "run"
    plain = ("train", str(recipe), "--out", str(run))
    longer = ["checkpoint.keep=0", "optimizer.weight_decay.attention=0.9"]
    # Another λ in the same folder: refused, with the table of differences and what can be asked.
    # A run that is trained to its end can only be forked.
    for more, mend in ((["--until", "5"], "resume.decay"), ([], f"--fork {run}@6")):
        assert pretrain(*plain, *more).returncode == 0
        refused = pretrain(*plain, *longer)
        assert refused.returncode == 2
        assert "query" in refused.stderr and "0.5 -> 0.9" in refused.stderr
        assert mend in refused.stderr and "Traceback" not in refused.stderr
    # Forked at step 3: a new folder, the same data to come, the new λ in use.
    fork = tmp_path / "fork"
    done = pretrain("train", str(recipe), *longer, "--out", str(fork), "--fork", f"{run}@3")
    assert done.returncode == 0, done.stderr
    rows = [row for row in metrics_of(fork) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [4, 5, 6]
    assert all(row["weight_decay"]["query"] == 0.9 for row in rows)
    before = {row["step"]: row for row in metrics_of(run) if row["kind"] == "train"}
    assert rows[0]["loss"] == before[4]["loss"]  # same weights, same samples
    assert rows[-1]["loss"] != before[6]["loss"]  # another decay since
    # The recipe's or the checkpoint's λ, as asked, in the run's own folder.
    for policy, wanted in (("recipe", 0.9), ("checkpoint", 0.5)):
        copy = tmp_path / policy
        part = pretrain("train", str(recipe), "--out", str(copy), "--fork", f"{run}@3")
        assert part.returncode == 0
        (copy / "checkpoints" / "step-00000006" / "manifest.json").unlink()
        words = [*longer, f"resume.decay={policy}"]
        again = pretrain("train", str(recipe), *words, "--out", str(copy))
        assert again.returncode == 0, again.stderr
        rows = [row for row in metrics_of(copy) if row["kind"] == "train"]
        assert rows[-1]["weight_decay"]["query"] == wanted

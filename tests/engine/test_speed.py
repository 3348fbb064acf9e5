"""What only changes speed changes no number: compiled or not, by products or by SDPA, in parts."""

from __future__ import annotations

import platform
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from models.kernels import Kernels
from pretrain.config.recipe import parse_config
from pretrain.config.run import SpeedConfig
from pretrain.engine.deepspeed_adapter import deepspeed_settings
from pretrain.engine.speed import choose_kernels
from pretrain.errors import UsageError
from tests.tools import (
    DIALECTS,
    base_recipe,
    check_theory,
    environment,
    losses_of,
    run_workers,
)

FAST = {"attention": "products", "compile": True}
PLAIN = {"attention": "sdpa", "compile": False}
GRIDS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {}, "recompute": {"activation_checkpointing": True}},
    2: {
        "tensor": {"tensor_parallel": 2, "sequence_parallel": True},
        "pipeline": {"pipeline_parallel": 2},
        "zero-2": {"zero_stage": 2},
    },
}


def recipe_for(
    data: Path, dialect: str, precision: str, speed: dict[str, Any], grid: dict[str, Any]
) -> dict[str, Any]:
    values = deepcopy(base_recipe(data))
    values["model"] |= DIALECTS[dialect] | {"context": 160}  # two blocks of queries
    # One shape on every grid, so that ranks and grids find what another one compiled.
    values["train"] = {"steps": 8, "global_batch": 8, "micro_batch": 4}
    values["precision"] = precision
    values["speed"], values["grid"] = speed, grid
    values["evaluation"]["every"] = values["ranks"]["every"] = values["checkpoint"]["every"] = 8
    values["evaluation"]["batch"] = 4  # a shape that is compiled for training
    return values


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Any, ...], Path]:
    """One run folder per (dialect, precision, speed, grid)."""
    folder = tmp_path_factory.mktemp("speed")
    found: dict[tuple[Any, ...], Path] = {}
    for processes, grids in GRIDS.items():
        cases = []
        for dialect in ("gpt2", "llama"):
            for name, grid in grids.items():
                wanted = [("fp32", "fast")]
                if dialect == "llama" and name != "one":
                    continue  # the compiler takes its time
                if name == "one":
                    wanted += [("fp32", "plain"), ("bf16", "plain")]
                if name == "one" and dialect == "gpt2":
                    wanted += [("bf16", "fast")]
                for precision, kind in wanted:
                    speed = FAST if kind == "fast" else PLAIN
                    key = (dialect, precision, kind, name)
                    found[key] = folder / "-".join(key)
                    recipe = recipe_for(data, dialect, precision, speed, grid)
                    cases.append({"recipe": recipe, "run": str(found[key])})
        run_workers(processes, "train", cases, folder / f"workers-{processes}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["gpt2", "llama"])
def test_fast_paths_change_no_number(runs: dict[tuple[Any, ...], Path], dialect: str) -> None:
    wanted = losses_of(runs[dialect, "fp32", "plain", "one"])
    assert wanted[-1] < wanted[0] - 0.1
    for (one, precision, kind, name), run in runs.items():
        if one != dialect:
            continue
        rounding = 1e-4 if precision == "fp32" else 1e-2
        found = losses_of(run)
        np.testing.assert_allclose(found, wanted, rtol=rounding, err_msg=f"{kind} {name}")
        check_theory(run)


def kernels_of(**values: object) -> Kernels:
    recipe = {"model": {"context": 256}, "precision": "bf16"} | values
    return choose_kernels(parse_config(recipe), SimpleNamespace(device=torch.device("cpu")))  # type: ignore[arg-type]


def test_what_is_left_open_is_decided_by_device_and_precision() -> None:
    assert kernels_of().attention == "products" and not kernels_of().compiled
    assert kernels_of(precision="fp32").attention == "sdpa"
    assert kernels_of(model={"context": 4096}).attention == "sdpa"
    assert kernels_of(speed={"attention": "sdpa"}).attention == "sdpa"
    assert kernels_of(speed={"loss_mib": 5}).loss_bytes == 5 << 20
    assert kernels_of().loss_bytes == SpeedConfig().loss_bytes("cpu") == 32 << 20
    assert SpeedConfig().loss_bytes("cuda") == 512 << 20
    assert kernels_of(grid={"activation_checkpointing": True}).recompute
    with pytest.raises(UsageError, match=r"speed\.compile: not possible with grid\.zero_stage 3"):
        parse_config({"speed": {"compile": True}, "grid": {"zero_stage": 3}})


def test_the_bucket_is_no_larger_than_the_model() -> None:
    grid: Any = SimpleNamespace(device=torch.device("cpu"))

    def bucket(parameters: int, **zero: int) -> int:
        config = parse_config({"deepspeed": {"zero_optimization": zero}})
        settings = deepspeed_settings(config, grid, 8, 1, parameters)
        size: int = settings["zero_optimization"]["reduce_bucket_size"]
        return size

    assert bucket(1000) == 1000 and bucket(10**10) == 500_000_000
    assert bucket(1000, reduce_bucket_size=77) == 77


RESIDENT = """
import sys, torch
from pretrain.engine.speed import keep_freed_memory
def resident():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) * 1024
if sys.argv[1] == "keep":
    keep_freed_memory(torch.device("cpu"))
before = resident()
values = torch.ones(50 << 20, dtype=torch.float32)
del values
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept() -> None:
    """200 MB that a tensor freed stay with the process, where glibc would give them back."""
    kept, given = (
        int(subprocess.run([sys.executable, "-c", RESIDENT, how], env=environment(),
                           capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "leave")
    )  # fmt: skip
    assert given < 50 << 20 < 150 << 20 < kept

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
from pretrain.engine.speed import choose_kernels, compiles, records_passes, speed_in_words
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
GRIDS: dict[str, tuple[int, dict[str, Any]]] = {
    # name: (processes, grid)
    "one": (1, {}),
    "recompute": (1, {"activation_checkpointing": True}),
    "tensor": (2, {"tensor_parallel": 2, "sequence_parallel": True}),
    "pipeline": (2, {"pipeline_parallel": 2}),
    "zero-2": (2, {"zero_stage": 2}),
    "recompute-2": (2, {"zero_stage": 2, "activation_checkpointing": True}),
}
Key = tuple[str, str, str, str]
"""Of a run: dialect, precision, fast or plain, name of the grid."""
REFERENCES: list[Key] = [
    (d, p, "plain", "one") for d in ("gpt2", "llama") for p in ("fp32", "bf16")
]
SAMPLE: list[Key] = [
    ("gpt2", "fp32", "fast", "pipeline"),
    ("gpt2", "fp32", "fast", "recompute-2"),
]
"""The compiler takes its time, so there is one set of kernels, which both grids share."""
EVERYTHING: list[Key] = [
    (d, p, "fast", g) for d in ("gpt2", "llama") for p in ("fp32", "bf16") for g in GRIDS
]


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


def train(keys: list[Key], data: Path, folder: Path) -> dict[Key, Path]:
    """One run folder for each key."""
    found = {key: folder / "-".join(key) for key in keys}
    for processes in (1, 2):
        cases = []
        for key, run in found.items():
            dialect, precision, kind, name = key
            count, grid = GRIDS[name]
            if count == processes:
                recipe = recipe_for(
                    data, dialect, precision, FAST if kind == "fast" else PLAIN, grid
                )
                cases.append({"recipe": recipe, "run": str(run)})
        run_workers(processes, "train", cases, folder / f"workers-{processes}")
    return found


def check(runs: dict[Key, Path], dialect: str) -> None:
    wanted = losses_of(runs[dialect, "fp32", "plain", "one"])
    assert wanted[-1] < wanted[0] - 0.1
    for (one, precision, kind, name), run in runs.items():
        if one != dialect:
            continue
        rounding = 1e-4 if precision == "fp32" else 1e-2
        found = losses_of(run)
        np.testing.assert_allclose(
            found, wanted, rtol=rounding, err_msg=f"{precision} {kind} {name}"
        )
        check_theory(run)


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Key, Path]:
    """The run folders of the sample, and the references of both dialects and precisions."""
    return train(REFERENCES + SAMPLE, data, tmp_path_factory.mktemp("speed"))


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["gpt2", "llama"])
def test_fast_paths_change_no_number(runs: dict[Key, Path], dialect: str) -> None:
    """Of GPT-2 in fp32, and for both dialects that bf16 is near fp32; `--long` compiles all."""
    check(runs, dialect)


@pytest.mark.long
@pytest.mark.parametrize("dialect", ["gpt2", "llama"])
def test_every_fast_path_changes_no_number(data: Path, tmp_path: Path, dialect: str) -> None:
    keys = [key for key in REFERENCES + EVERYTHING if key[0] == dialect]
    check(train(keys, data, tmp_path), dialect)


def grid_of(device: str, **more: int) -> Any:
    sizes = {"data": 1, "tensor": 1, "pipeline": 1, "world_size": 1} | more
    return SimpleNamespace(device=torch.device(device), **sizes)


def kernels_of(**values: object) -> Kernels:
    recipe = {"model": {"context": 256}, "precision": "bf16"} | values
    return choose_kernels(parse_config(recipe), grid_of("cpu"))


def test_what_is_left_open_is_decided_by_device_and_precision() -> None:
    assert kernels_of().attention == "products" and not kernels_of().compiled
    assert kernels_of(precision="fp32").attention == "sdpa"
    assert kernels_of(model={"context": 4096}).attention == "sdpa"
    assert kernels_of(speed={"attention": "sdpa"}).attention == "sdpa"
    assert kernels_of(speed={"loss_mib": 5}).loss_bytes == 5 << 20
    assert kernels_of().loss_bytes == SpeedConfig().loss_bytes("cpu", False) == 32 << 20
    assert SpeedConfig().loss_bytes("cuda", False) == 512 << 20
    assert SpeedConfig().loss_bytes("cuda", True) == 2048 << 20
    assert kernels_of(grid={"activation_checkpointing": True}).recompute
    with pytest.raises(UsageError, match=r"speed\.compile: not possible with grid\.zero_stage 3"):
        parse_config({"speed": {"compile": True}, "grid": {"zero_stage": 3}})


def chosen(monkeypatch: pytest.MonkeyPatch, broken: str = "", **values: Any) -> tuple[bool, bool]:
    """Whether a recipe's blocks are compiled, and its passes recorded, on a GPU."""
    monkeypatch.setattr("pretrain.engine.speed.why_not_compiled", lambda: broken)
    data = values.pop("data_parallel", 1)
    recipe = {"model": SMALL, "train": {"steps": 100_000}} | values
    config, grid = parse_config(recipe), grid_of("cuda", data=data, world_size=data)
    assert choose_kernels(config, grid).joined
    kinds = choose_kernels(config, grid).compiled, records_passes(config, grid)
    words = " ".join(speed_in_words(config, grid))
    assert ("are compiled" in words) == (kinds[0] and config.speed.compile == "auto")
    assert ("CUDA graphs" in words) == (kinds[1] and config.speed.graph == "auto")
    assert bool(broken) <= (broken in words)
    return kinds


SMALL = {"num_layers": 6, "hidden_size": 256, "num_attention_heads": 4, "vocabulary_size": 8192}
LARGE = {"num_layers": 24, "hidden_size": 2048, "num_attention_heads": 16, "context": 2048,
         "vocabulary_size": 50304}  # fmt: skip


def test_a_gpu_compiles_long_runs_and_records_short_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(**values: Any) -> tuple[bool, bool]:
        return chosen(monkeypatch, **values)

    assert of() == (True, True)
    assert of(train={"steps": 200}) == (False, True)  # over before the compiler has gained
    assert of(model=LARGE, train={"steps": 200, "global_batch": 512, "micro_batch": 8})[0]
    assert not of(model=LARGE, train={"steps": 10_000, "micro_batch": 8})[1]
    assert of(model=LARGE, train={"steps": 10_000, "micro_batch": 1})[1]
    assert of(broken="no C compiler") == (False, True)
    assert of(grid={"zero_stage": 3}, precision="bf16") == (False, False)
    assert of(grid={"zero_stage": 2}, precision="bf16") == (True, False)
    assert of(data_parallel=2) == (True, False)
    two = grid_of("cuda", data=2, world_size=2)
    asked = parse_config({"model": SMALL, "speed": {"graph": True, "compile": False}})
    assert speed_in_words(asked, two) == ["no CUDA graphs: several processes train (speed.graph)"]
    for value in (True, False):
        assert of(speed={"compile": value})[0] is value
        assert of(speed={"graph": value})[1] is value
    with pytest.raises(UsageError, match=r"speed\.graph: not possible where DeepSpeed"):
        parse_config({"speed": {"graph": True}, "grid": {"zero_stage": 3}})


def test_a_short_run_does_not_try_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes seconds, which a run of seconds would only lose."""
    monkeypatch.setattr("pretrain.engine.speed.why_not_compiled", lambda: pytest.fail("tried"))
    config = parse_config({"model": SMALL, "train": {"steps": 200}, "speed": {"graph": False}})
    assert not compiles(config, grid_of("cuda"))
    (words,) = speed_in_words(config, grid_of("cuda"))
    assert words == "not compiled: too short to gain from it (speed.compile)"


def test_nothing_is_chosen_without_a_gpu() -> None:
    config = parse_config({"model": SMALL, "train": {"steps": 10**7}})
    assert not compiles(config, grid_of("cpu")) and not records_passes(config, grid_of("cpu"))
    assert speed_in_words(config, grid_of("cpu")) == []


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

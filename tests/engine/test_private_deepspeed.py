"""The private side of DeepSpeed stays behind `pretrain/engine`, on one list that is true."""

from __future__ import annotations

import ast
import contextlib
import ctypes
import inspect
import io
import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Container
from copy import deepcopy
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from models.roles import Role
from pretrain.engine.private import PRIVATE, Case, Private, used
from tests.tools import base_recipe, run_workers

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = {part for one in PRIVATE for part in one.name.split(".")} - {
    "all_gather", "optimizer", "start",
}  # fmt: skip
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    # name: (processes, what differs in the recipe)
    **{f"zero-{stage}": (1, {"grid": {"zero_stage": stage}}) for stage in range(4)},
    "zero-1-bf16": (1, {"grid": {"zero_stage": 1}, "precision": "bf16"}),
    **{
        f"offload-{stage}": (1, {"grid": {"zero_stage": stage}, "deepspeed": OFFLOAD})
        for stage in (1, 2)
    },
    "pipeline-0": (2, {"grid": {"pipeline_parallel": 2, "zero_stage": 0}}),
    "pipeline-1": (2, {"grid": {"pipeline_parallel": 2, "zero_stage": 1}, "precision": "bf16"}),
}


@pytest.fixture(scope="module")
def seen(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What an engine of every case shows."""
    folder = tmp_path_factory.mktemp("private")
    found: dict[str, dict[str, Any]] = {}
    for processes in (1, 2):
        names = [name for name, (count, _) in CASES.items() if count == processes]
        cases = []
        for name in names:
            recipe = deepcopy(base_recipe(data))
            recipe["speed"] = {"update": "deepspeed"}
            recipe["model"] |= {"tied_head": True, "vocabulary_size": 100}
            cases.append({"recipe": recipe | CASES[name][1], "cases": cases_of(name)})
        answers = run_workers(processes, "private", cases, folder / str(processes))
        found |= dict(zip(names, answers, strict=True))
    return found


def cases_of(name: str) -> list[Case]:
    wanted: list[Case] = ["pipeline", "offload"]
    return [case for case in wanted if case in name]


def of_case(name: str) -> list[Private]:
    return used(CASES[name][1]["grid"]["zero_stage"], cases_of(name))


@pytest.mark.parametrize("name", CASES)
def test_what_is_hidden_is_named(seen: dict[str, dict[str, Any]], name: str) -> None:
    """With any one attribute gone, the engine's check says which, what for, and the mend."""
    hidden = seen[name]["hidden"]
    assert set(hidden) == {str(one) for one in of_case(name) if one.holder != "gradient"}
    for one in of_case(name):
        if one.holder != "gradient":
            message = hidden[str(one)]
            assert f"has no {one} any more" in message, (one, message)
            assert one.why in message and "pip install 'deepspeed" in message


@pytest.mark.parametrize("name", CASES)
def test_what_stands_in_deepspeeds_place_is_called(
    seen: dict[str, dict[str, Any]], name: str
) -> None:
    replaced = [one for one in of_case(name) if one.use == "replaced" and one.holder != "class"]
    if CASES[name][1].get("precision") != "bf16":  # other sums of gradients: nothing to put right
        replaced = [one for one in replaced if one.holder != "pipeline"]
    for one in replaced:
        assert seen[name]["calls"].get(str(one), 0) > 0, (
            f"DeepSpeed no longer calls {one}, which is replaced: {one.why}"
        )
    assert seen[name]["norm"] > 0
    if used_zero := CASES[name][1]["grid"]["zero_stage"]:
        wanted = "DeepSpeedZeroOptimizer" + ("_Stage3" if used_zero == 3 else "")
        assert seen[name]["class"] == wanted, "class._do_optimizer_sanity_check decides otherwise"


def test_deepspeed_still_reads_what_is_set() -> None:
    """What no engine shows before an update: the words must be in DeepSpeed's own source."""
    spec = find_spec("deepspeed")
    assert spec and spec.origin
    text = "".join(
        path.read_text(encoding="utf-8")
        for path in (Path(spec.origin).parent / "runtime").rglob("*.py")
    )
    for one in PRIVATE:
        if one.use == "set" or one.holder == "gradient":
            assert one.name in text, f"DeepSpeed no longer knows {one}: {one.why}"


# --- the wall ----------------------------------------------------------------------------------


def attributes(path: Path, names: Container[str] | None = None) -> list[tuple[str, str]]:
    """Every (object, attribute) that a file asks for, `getattr` with a constant too.

    Args:
        names: of attributes; None: all of them.
    """
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            if names is None or node.attr in names:
                found.append((ast.unparse(node.value), node.attr))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("attr"):
            holder, name = (*node.args[:2], None, None)[:2]
            if (
                isinstance(name, ast.Constant)
                and holder is not None
                and (names is None or str(name.value) in names)
            ):
                found.append((ast.unparse(holder), str(name.value)))
    return found


def test_no_private_attribute_outside_the_engine() -> None:
    for folder in ("pretrain", "models", "data_pipeline", "launchers", "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            if ROOT / "pretrain" / "engine" not in path.parents:
                wrong = {f"{of}.{name}" for of, name in attributes(path, {*NAMES, "_updater"})}
                assert not wrong, (path, wrong)


PUBLIC = {
    "Init", "destroy", "get_global_grad_norm", "init_distributed", "initialize", "train_batch",
    "zero", "zero_cpu_offload", "zero_optimization", "zero_optimization_stage",
}  # fmt: skip
"""Of DeepSpeed, and documented."""
OF_OPTIMIZERS = {"found_inf", "grad_scale", "hooked"}
"""What torch.amp.GradScaler sets, and torch's fused optimizers read; the mark of a step that torch
has wrapped (`tests/engine/test_flat_update.py` fails without it)."""
OF_DEVICES = {"total_memory"}
"""What `torch.cuda.get_device_properties` tells."""


def known_names() -> set[str]:
    """Attributes of torch, of the standard library's modules in use, and of this product."""
    found = PUBLIC | OF_OPTIMIZERS | OF_DEVICES
    libraries = (
        torch, torch.cpu, torch.linalg, torch.nn, torch.optim, torch.distributed, torch.Tensor,
        torch.Size, torch.nn.Module, torch.optim.Optimizer, str, list, dict, set, float,
        contextlib, ctypes, ctypes.CDLL(None), io, logging, logging.Logger, warnings, metadata,
        BaseModel, contextlib.ExitStack, sys, time, torch.cuda, torch.cuda.Event,
        torch.cuda.Stream, torch.cuda.CUDAGraph, torch.distributed.ReduceOp, os, platform, Role,
        inspect,
    )  # fmt: skip
    for one in libraries:
        found |= set(dir(one))
    for package in ("pretrain", "models", "data_pipeline"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    found.add(node.name)
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    found.add(node.target.id)  # a field
                elif isinstance(node, ast.alias):
                    found.add(node.name.rpartition(".")[2])
                elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    found |= {node.attr} if ast.unparse(node.value) == "self" else set()
    return found


def test_the_engine_uses_nothing_private_that_is_not_on_the_list() -> None:
    unknown, met, known = set(), set(), known_names()
    for path in (ROOT / "pretrain" / "engine").glob("*.py"):
        for of, name in attributes(path):
            met.add(name)
            hidden = name.startswith(("_", "ds_")) and not name.startswith(("_foreach", "__"))
            if (hidden and of not in ("self", "cls")) or name not in known | {"mallopt"}:
                unknown.add(name)
    assert not (new := unknown - NAMES), (
        f"{new}: add them to pretrain/engine/private.py, or do without"
    )
    assert not NAMES - met, "nothing uses these any more"

"""``train.micro_batch: auto``: fits by the plan's formula, fills pipelines, changes no result."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml

from pretrain.cluster.plan import choose, rank
from pretrain.config.recipe import Config, parse_config
from pretrain.distributed.cores import usable_memory
from pretrain.distributed.grid import Grid
from pretrain.engine import micro_batch
from pretrain.engine.accelerators import DEVICES
from pretrain.engine.layout import empty_grid, layout_of
from pretrain.engine.memory import memory_of, process_bytes
from pretrain.engine.micro_batch import largest_micro_batch, memory_here, with_size
from pretrain.engine.sizes import Sizes, sizes_of
from tests.tools import base_recipe, losses_of, run, write_recipe

SHAPE = {"num_layers": 8, "hidden_size": 512, "num_attention_heads": 8, "context": 512,
         "vocabulary_size": 4096}  # fmt: skip


def config_of(batch: int = 96, **grid: Any) -> Config:
    train = {"global_batch": batch, "micro_batch": "auto"}
    return parse_config({"model": SHAPE, "train": train, "grid": grid})


def needed(config: Config, size: int, device: str, count: int, sizes: Sizes) -> float:
    layout = layout_of(with_size(config, size), device, count, *process_bytes(device))
    return sum(memory_of(sizes, layout).values())


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_it_is_the_largest_that_fits(device: str) -> None:
    """For every grid and memory: within the margin, and no larger size that is allowed is."""
    limits: set[str] = set()
    for tensor, pipeline, batch, again in itertools.product(
        (1, 2), (1, 2, 4), (7, 96), (False, True)
    ):
        count = 8 if batch == 96 else tensor * pipeline
        config = config_of(batch, tensor_parallel=tensor, pipeline_parallel=pipeline,
                           activation_checkpointing=again)  # fmt: skip
        share = batch // empty_grid(config, device, count).data
        sizes, shape = [size for size in range(1, share + 1) if share % size == 0], sizes_of(config)
        needs = {size: needed(config, size, device, count, shape) for size in sizes}
        before = 0
        for memory in (1e9, 2e9, 4e9, 8e9, 64e9):
            found = largest_micro_batch(config, device, count, memory, shape).size
            assert share % found == 0 and found >= before
            before = found
            assert needs[found] <= 0.8 * memory or found == 1
            for size in sizes[sizes.index(found) + 1 :]:
                why = {
                    "memory": needs[size] > 0.8 * memory,
                    "bubble": pipeline > 1 and share // size < min(share, 4 * pipeline),
                    "tokens": device == "cpu" and size * 512 > 8192,
                }
                assert any(why.values()), (tensor, pipeline, batch, memory, found, size)
                limits.update(name for name, holds in why.items() if holds)
    assert limits >= {"memory", "bubble"} | ({"tokens"} if device == "cpu" else set())


def test_what_it_says() -> None:
    said = {
        largest_micro_batch(config, "cuda", 8, memory).in_words()
        for config, memory in (
            (config_of(), 80e9), (config_of(), 3.2e9), (config_of(), 1e9),
            (config_of(pipeline_parallel=2), 80e9),
        )
    }  # fmt: skip
    assert all(text.endswith(" (train.micro_batch: auto)") for text in said)
    texts = " | ".join(sorted(said))
    assert "micro batch 12: all sequences of a process" in texts
    assert "more than 80% of the 3.2 GB of a process" in texts
    assert "micro batch 1: even this needs about" in texts
    assert "micro batch 3: 8 micro batches fill 2 stages" in texts


def test_the_plan_advises_what_training_takes() -> None:
    device = replace(DEVICES["h100"], memory=4.0)
    for choice in rank(config_of(256), device, 8):
        grid = {
            "tensor_parallel": choice.tensor,
            "pipeline_parallel": choice.pipeline,
            "zero_stage": choice.zero_stage,
            "activation_checkpointing": choice.recompute,
        }
        config = config_of(256, **grid)
        assert choice.micro_batch == largest_micro_batch(config, "cuda", 8, 4e9).size
        assert choose(config, device, 8) == choice


def test_processes_agree_on_the_least_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of a node share its memory; a node with less decides for all."""

    class Gathered(Grid):
        def gather(self, value: Any) -> list[Any]:
            return [("one", 64), ("one", 64), ("two", 40), ("three", 30)]

    monkeypatch.setattr(micro_batch, "memory_of_device", lambda device: 64)

    def of(device: str) -> float:
        return memory_here(Gathered(1, 1, 4, 0, torch.device(device), *cast("Any", [None] * 3)))

    assert of("cpu") == 30 and of("cuda") == 30
    monkeypatch.setattr(Gathered, "gather", lambda *_: [("one", 64), ("one", 64), ("two", 40)])
    assert of("cpu") == 32 and of("cuda") == 40


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"a/b/memory.max": "5000"}, 5000),
        ({"a/b/memory.max": "max", "a/memory.max": "7000", "memory.max": "9000"}, 7000),
        ({"memory/a/b/memory.limit_in_bytes": "6000"}, 6000),
        ({"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
        ({}, None),
    ],
)
def test_a_limit_of_memory_is_seen(
    files: dict[str, str], limit: int | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text + "\n")
    (tmp_path / "own").write_text("0::/a/b\n4:memory:/a/b\n")
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert usable_memory(tmp_path / "fs", tmp_path / "own") == (limit or whole)


@pytest.mark.slow
def test_a_run_goes_on_with_another_size(
    data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Two machines, one recipe: the size is said and recorded, and the losses are the same."""
    values = base_recipe(data)
    values["ranks"], values["evaluation"]["at_end"] = {"every": 6}, "none"
    recipe = str(write_recipe(tmp_path / "recipe.yaml", values))
    auto, out = "train.micro_batch=auto", tmp_path / "run"
    assert run(monkeypatch, "train", recipe, auto, "--dry-run") == 0
    assert "micro batch 8: all sequences of a process (train.micro" in capfd.readouterr().out
    assert run(monkeypatch, "train", recipe, auto, "--out", str(out), "--until", "3") == 0
    assert f"{out}: micro batch 8: all sequences" in capfd.readouterr().err
    monkeypatch.setattr(micro_batch, "memory_of_device", lambda device: 1)
    assert run(monkeypatch, "train", recipe, auto, "--out", str(out)) == 0
    assert "micro batch 1: even this needs about" in capfd.readouterr().err
    starts = json.loads((out / "environment.json").read_text())
    assert [start["micro_batch"]["size"] for start in starts] == [8, 1]
    assert yaml.safe_load((out / "config.yaml").read_text())["train"]["micro_batch"] == 1
    plain = tmp_path / "plain"
    assert run(monkeypatch, "train", recipe, "--out", str(plain)) == 0
    np.testing.assert_allclose(losses_of(out), losses_of(plain), rtol=1e-6)


def test_another_word_is_refused(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_recipe(tmp_path / "recipe.yaml", base_recipe(data)))
    for word in ("most", "-1", "1.5"):
        assert run(monkeypatch, "train", recipe, f"train.micro_batch={word}", "--dry-run") == 2
        assert "command line: train.micro_batch" in capsys.readouterr().err

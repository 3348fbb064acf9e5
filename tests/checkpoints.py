"""Small checkpoints without a training run, and a grid of this process alone."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from models.gpt import whole_model
from pretrain.checkpoint.manifest import (
    MANIFEST,
    MASTER,
    describe,
    written_manifest,
)
from pretrain.checkpoint.reader import (
    CHECKPOINTS,
    RUN_ID,
    Checkpoint,
    checkpoint_name,
)
from pretrain.checkpoint.saver import Saver
from pretrain.checkpoint.tensor_file import write_tensors
from pretrain.config.recipe import Config, parse_config
from pretrain.config.run import CheckpointConfig
from pretrain.decay.plan import DecayPlan, plan_decay
from tests.tools import base_recipe


class Alone:
    """What `Grid` is to its users, for one process that knows no process group."""

    rank, world_size, is_main = 0, 1, True

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        yield


@cache
def small_plan() -> tuple[Config, DecayPlan]:
    values = base_recipe(Path("data"))
    values["model"] |= {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "context": 8}
    values["model"]["vocabulary_size"] = 16
    config = parse_config(values)
    return config, plan_decay(whole_model(config.model, 1), config.optimizer.weight_decay)


def values_of(name: str, numel: int, step: int) -> Tensor:
    """What the checkpoint of a step holds of a parameter."""
    seed = step * 1000 + sum(map(ord, name))
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def small_config(rate: float = 3e-3) -> Config:
    """The recipe of `write_checkpoint`."""
    config, _ = small_plan()
    changed = config.optimizer.model_copy(update={"learning_rate": rate})
    return config.model_copy(update={"optimizer": changed})


def write_checkpoint(
    run: Path, step: int, parts: int = 2, run_id: str = "", rate: float = 3e-3
) -> Path:
    """A whole checkpoint of a small model whose masters are spread over some files."""
    config, plan = small_config(rate), small_plan()[1]
    folder = run / CHECKPOINTS / checkpoint_name(step)
    folder.mkdir(parents=True)
    state = {"tokenizer": "t", "data": "d", "decay": {"books": {}}, "held_out_loss": 1.0 / step}
    grid = {"tensor": 1, "pipeline": 1, "data": parts, "zero_stage": 1}
    described = {**describe(config, plan, step, state, grid), "run": run_id}
    infos = [info for group in plan.groups for info in group.parameters]
    for part in range(parts):
        tensors, index = {}, {}
        for info in infos:
            start, stop = (info.numel * n // parts for n in (part, part + 1))
            if stop > start:
                values = values_of(info.name, info.numel, step)[start:stop].clone()
                tensors[f"{info.name}/{MASTER}"] = values
                index[info.name] = [start, stop - start, [MASTER]]
        name = f"rank-{part:05d}.safetensors"
        size, digest = write_tensors(folder / name, tensors)
        entry = {"size": size, "sha256": digest, "tensor_rank": 0, "fragments": index}
        described["files"][name] = entry
    (folder / MANIFEST).write_bytes(written_manifest(described))
    return folder


def write_run(run: Path, steps: tuple[int, ...], parts: int = 2, run_id: str = "0000aaaa") -> Path:
    """A run folder with checkpoints of one run; returns its ``checkpoints``."""
    for step in steps:
        write_checkpoint(run, step, parts, run_id)
    (run / RUN_ID).write_text(run_id)
    return run / CHECKPOINTS


STEPS = (2, 4, 6, 8)


def retain(folder: Path, **settings: int) -> None:
    """What a saver does to older checkpoints after a new one."""
    saver = SimpleNamespace(folder=folder, settings=CheckpointConfig(**settings), _pusher=None)
    Saver._retain(saver)  # type: ignore[arg-type]


def same_values(checkpoint: Checkpoint) -> None:
    for name, entry in checkpoint.parameters.items():
        numel = 1
        for length in entry["shape"]:
            numel *= length
        assert checkpoint.full(name).reshape(-1).equal(values_of(name, numel, checkpoint.step))


def contents(folder: Path) -> Counter[str]:
    """How often each content is there, under whatever name."""
    return Counter(
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    )


def copy_tree(source: Path, target: Path) -> None:
    """Links as links; without pipes and devices."""

    def odd(where: str, names: list[str]) -> list[str]:
        paths = {name: Path(where) / name for name in names}
        return [n for n, p in paths.items() if not (p.is_symlink() or p.is_dir() or p.is_file())]

    shutil.copytree(source, target, symlinks=True, ignore=odd)


def copy_as(name: str) -> Callable[[Path], Path]:
    def put(folder: Path) -> Path:
        copy_tree(folder / "step-00000004", folder / name)
        return folder / name

    return put


def put_file(folder: Path) -> Path:
    (folder / "step-00000010").write_text("notes")
    return folder / "step-00000010"


def put_folder(folder: Path) -> Path:
    (folder / "step-00000010").mkdir()
    (folder / "step-00000010/plan.txt").write_text("notes")
    return folder / "step-00000010"


def put_link(folder: Path) -> Path:
    (folder / "step-00000010").symlink_to(folder / "step-00000002")
    return folder / "step-00000010"


def put_dangling(folder: Path) -> Path:
    (folder / "step-00000010").symlink_to(folder / "nowhere")
    return folder / "step-00000010"


def put_in_place_of(file: Path, kind: str) -> None:
    """What is no file, under the name of one: a pipe, a folder, or a link to what has no end."""
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        ends = {"zero": Path("/dev/zero"), "dangling": Path("/nowhere"), "loop": file}
        file.symlink_to(ends[kind])

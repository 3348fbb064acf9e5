"""Checkpoints: every tensor by its global name, in safetensors, readable on any grid.

A checkpoint is a folder ``step-00000100/``: one file per writing rank with the fp32 masters and
optimizer moments that the rank owns, and ``manifest.json``, which says where every element is.
Nothing is keyed by position, so that no restore can hand a tensor another's λ, and nothing is
pickled. The folder is written aside and renamed: it is whole or it is not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.files import write_synced
from models.factors import Factors
from models.roles import ParameterInfo, Role, declared_parameters, info_of
from pretrain.config import Config, parse_config
from pretrain.engine import Engine
from pretrain.errors import RunError
from pretrain.grid import Grid
from pretrain.masters import Fragment, is_replicated, local_shape, prepare_moments, write_back

MANIFEST = "manifest.json"
VERSION = 1
MASTER = "master"
ATTENTION_PARTS = ("query", "key", "value", "output")


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` updates."""
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in ``RUN/checkpoints``, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.glob("step-*") if (path / MANIFEST).is_file())


# --- writing --------------------------------------------------------------------------------


def save_checkpoint(
    engine: Engine, folder: Path, step: int, state: dict[str, Any], keep: int = 0
) -> Path:
    """Write the checkpoint after ``step`` updates; a collective call.

    Args:
        folder: ``RUN/checkpoints``.
        state: what else to remember (JSON), for example the data's identity.
        keep: delete all but so many newest ones afterwards; 0: keep all.

    Raises:
        RunError: on every rank, if any rank could not write; earlier checkpoints are untouched.
    """
    grid = engine.grid
    target = folder / checkpoint_name(step)
    aside = folder / f".{target.name}.writing"
    with _cleaned_up(aside, grid), grid.together(f"checkpoint at step {step} not written"):
        aside.mkdir(parents=True, exist_ok=True)
        entry = _write_rank(engine, aside)
    entries = grid.gather(entry)
    with _cleaned_up(aside, grid), grid.together(f"checkpoint at step {step} not written"):
        if grid.is_main:
            manifest = _manifest(engine, step, state, dict(filter(None, entries)))
            write_synced(aside / MANIFEST, json.dumps(manifest).encode())
            if target.exists():
                shutil.rmtree(target)
            os.rename(aside, target)
            _sync_folder(folder)
            for old in list_checkpoints(folder)[: -keep or None] if keep else []:
                shutil.rmtree(old)
    return target


@contextmanager
def _cleaned_up(aside: Path, grid: Grid) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if grid.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        reason = str(error).strip().splitlines()[0]
        raise RunError(
            f"{reason}; free space or fix {aside.parent}, then start again: the run goes on from "
            "its last checkpoint"
        ) from None


def _write_rank(engine: Engine, aside: Path) -> tuple[str, dict[str, Any]] | None:
    """Write what this rank owns; returns (file name, its index), or None for nothing."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    grid = engine.grid
    if is_replicated(engine.deepspeed) and grid.data_rank > 0:
        return None
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    index: dict[str, Any] = {}
    for fragment in engine.fragments():
        if not _writes(fragment, grid):
            continue
        values = {MASTER: fragment.master, **fragment.moments()}
        for key, value in values.items():
            tensors[f"{fragment.info.name}/{key}"] = value.detach().to("cpu", copy=True)
        index[fragment.info.name] = [fragment.offset, fragment.master.numel(), sorted(values)]
    name = f"rank-{grid.rank:05d}.safetensors"
    try:
        save_file(tensors, aside / name)
    except SafetensorError as error:  # how it reports a full disk
        raise RunError(str(error)) from None
    with (aside / name).open("rb+") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = (aside / name).stat().st_size
    return name, {
        "size": size,
        "sha256": digest,
        "tensor_rank": grid.tensor_rank,
        "fragments": index,
    }


def _writes(fragment: Fragment, grid: Grid) -> bool:
    """Whether this rank's copy is the one that is kept, where several ranks hold the same."""
    if getattr(fragment.parameter, "ds_pipe_replicated", False):
        return False
    return fragment.info.partition_dim is not None or grid.tensor_rank == 0


def _manifest(
    engine: Engine, step: int, state: dict[str, Any], files: dict[str, Any]
) -> dict[str, Any]:
    decays = engine.plan.by_name
    infos = {info.name: info for group in engine.plan.groups for info in group.parameters}
    return {
        "version": VERSION,
        "step": step,
        "state": state,
        "config": engine.config.model_dump(mode="json"),
        "grid": {
            "tensor": engine.grid.tensor,
            "pipeline": engine.grid.pipeline,
            "data": engine.grid.data,
            "zero_stage": engine.config.grid.zero_stage,
        },
        "parameters": {
            name: {
                "role": info.role.value,
                "layer": info.layer,
                "shape": info.shape,
                "partition_dim": info.partition_dim,
                "decay": decays[name],
            }
            for name, info in infos.items()
        },
        "files": files,
    }


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- reading --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where some elements of a local shard are stored."""

    file: str
    tensor_rank: int
    offset: int
    numel: int


class Checkpoint:
    """A checkpoint on disk, read element-wise, whatever grid wrote it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            if manifest["version"] != VERSION:
                raise RunError(
                    f"{path}: version {manifest['version']}, this program reads {VERSION}"
                )
            self.step: int = manifest["step"]
            self.state: dict[str, Any] = manifest["state"]
            self.config: Config = parse_config(manifest["config"], f"{path}/{MANIFEST}")
            self.tensor_parallel: int = manifest["grid"]["tensor"]
            self.parameters: dict[str, dict[str, Any]] = manifest["parameters"]
            self._files: dict[str, Any] = manifest["files"]
        except OSError as error:
            raise RunError(f"{path}: no checkpoint here ({error.strerror})") from None
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise RunError(
                f"{path}/{MANIFEST}: damaged ({type(error).__name__}); delete this checkpoint to "
                "go on from the one before"
            ) from None
        self._places: dict[tuple[str, str], list[_Place]] = defaultdict(list)
        for file, entry in self._files.items():
            for name, (offset, numel, keys) in entry["fragments"].items():
                for key in keys:
                    place = _Place(file, entry["tensor_rank"], offset, numel)
                    self._places[name, key].append(place)
        self._open: dict[str, Any] = {}

    @property
    def decays(self) -> dict[str, float]:
        """λ by parameter name, as it was when the checkpoint was written."""
        return {name: entry["decay"] for name, entry in self.parameters.items()}

    @property
    def digest(self) -> str:
        """Hash of all it holds: two runs that fork from equal ones begin equally."""
        sums = sorted(entry["sha256"] for entry in self._files.values())
        return hashlib.sha256("".join(sums).encode()).hexdigest()

    def keys(self, name: str) -> list[str]:
        """What is stored for a parameter: the master and the optimizer's moments."""
        return sorted(key for one, key in self._places if one == name)

    def full(self, name: str, key: str = MASTER) -> Tensor:
        """The global tensor, float32, without regard to how it was split."""
        entry = self.parameters[name]
        shape, dim = list(entry["shape"]), entry["partition_dim"]
        if dim is None:
            return self._shard(name, key, 0, shape)
        shape[dim] //= self.tensor_parallel
        parts = [self._shard(name, key, rank, shape) for rank in range(self.tensor_parallel)]
        return torch.cat(parts, dim)

    def attention(self, layer: int) -> Factors:
        """The attention matrices of a layer, by head."""
        names = (f"blocks.{layer}.attention.{part}.weight" for part in ATTENTION_PARTS)
        return Factors.of_layer(self.config.model.attention_shape, *map(self.full, names))

    def local(self, info: ParameterInfo, key: str, rank: int, size: int) -> Tensor:
        """The flat shard of tensor-parallel rank ``rank`` of ``size``."""
        if info.name not in self.parameters:
            raise RunError(f"{self.path}: has no {info.name}; it is of another model")
        stored, dim = tuple(self.parameters[info.name]["shape"]), info.partition_dim
        if stored == info.shape and dim is not None and size == self.tensor_parallel:
            shape = list(stored)
            shape[dim] //= size
            return self._shard(info.name, key, rank, shape).reshape(-1)  # nobody else's part
        values = self.full(info.name, key)
        if values.shape != info.shape:
            values = self._repadded(values, info)
        if dim is not None and size > 1:
            values = values.chunk(size, dim)[rank]
        return values.reshape(-1)

    def _repadded(self, values: Tensor, info: ParameterInfo) -> Tensor:
        """Vocabulary matrices are padded as the grid needs; the padding is zero."""
        vocabulary = self.config.model.vocabulary_size
        if info.role not in (Role.EMBEDDING, Role.HEAD) or values.shape[1:] != info.shape[1:]:
            raise RunError(
                f"{self.path}: {info.name} is {tuple(values.shape)}, the model wants {info.shape}"
            )
        fresh = torch.zeros(info.shape)
        fresh[:vocabulary] = values[:vocabulary]
        return fresh

    def _shard(self, name: str, key: str, tensor_rank: int, shape: list[int]) -> Tensor:
        flat = torch.empty(int(torch.Size(shape).numel()))
        filled = 0
        for place in self._places[name, key]:
            if place.tensor_rank == tensor_rank:
                values = self._file(place.file).get_tensor(f"{name}/{key}")
                flat[place.offset : place.offset + place.numel] = values
                filled += place.numel
        if filled != flat.numel():
            raise RunError(f"{self.path}: {name} ({key}) is incomplete: {filled}/{flat.numel()}")
        return flat.view(shape)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            from safetensors import safe_open

            path, entry = self.path / name, self._files[name]
            try:
                with path.open("rb") as file:
                    whole = hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]
            except OSError as error:
                raise RunError(f"{path}: cannot be read ({error.strerror})") from None
            if not whole:
                raise RunError(
                    f"{path}: damaged (its checksum differs); delete {self.path.name} to go on "
                    "from the checkpoint before"
                )
            self._open[name] = safe_open(path, framework="pt")
        return self._open[name]

    def rng_state(self, rank: int) -> Tensor | None:
        """The random state of a rank, if it wrote one."""
        name = f"rank-{rank:05d}.safetensors"
        if name not in self._files:
            return None
        state: Tensor = self._file(name).get_tensor("rng")
        return state


@torch.no_grad()
def load_into_engine(checkpoint: Checkpoint, engine: Engine) -> None:
    """Set masters, moments and working weights of every rank from ``checkpoint``.

    λ is not restored here: it is the plan's, and `Engine.audit_decay` proves it.
    """
    grid = engine.grid
    masters = restore_weights(checkpoint, engine.module, grid)
    owned = {id(fragment.parameter): fragment for fragment in engine.fragments()}
    for parameter, values in masters:
        fragment = owned.get(id(parameter))
        if fragment is None:
            continue
        stop = fragment.offset + fragment.master.numel()
        fragment.master.copy_(values[fragment.offset : stop])
        keys = tuple(key for key in checkpoint.keys(fragment.info.name) if key != MASTER)
        if keys:
            prepare_moments(fragment, keys, checkpoint.step)
        views = fragment.moments()
        for key in keys:
            whole = checkpoint.local(fragment.info, key, grid.tensor_rank, grid.tensor)
            views[key].copy_(whole[fragment.offset : stop])
    state = checkpoint.rng_state(grid.rank)
    if state is not None:
        torch.set_rng_state(state)


def restore_weights(
    checkpoint: Checkpoint, module: nn.Module, grid: Grid
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Set the working weights of this rank's part of the model, one parameter at a time.

    Yields:
        Each parameter with its local shard, flat float32, for whoever restores masters too.
    """
    for parameter in declared_parameters(module):
        values = checkpoint.local(info_of(parameter), MASTER, grid.tensor_rank, grid.tensor)
        assert values.numel() == local_shape(parameter).numel()
        with torch.no_grad():
            write_back(parameter, values)
        yield parameter, values


def load_into_module(checkpoint: Checkpoint, module: nn.Module, grid: Grid) -> None:
    """Set the working weights of this rank's part of the model."""
    for _ in restore_weights(checkpoint, module, grid):
        pass

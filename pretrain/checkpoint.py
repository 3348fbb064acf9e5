"""Checkpoints: every tensor by its global name, in safetensors, readable on any grid.

A checkpoint is a folder ``step-00000100/``: one file per writing rank with the fp32 masters and
optimizer moments that the rank owns, and ``manifest.json``, which says where every element is.
Nothing is keyed by position, so that no restore can hand a tensor another's λ, and nothing is
pickled. The folder is written aside and renamed: it is whole or it is not there.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.factors import Factors
from models.roles import ParameterInfo, Role, declared_parameters, info_of
from pretrain.config import Config, parse_config
from pretrain.decay import DecayPlan
from pretrain.engine import Engine
from pretrain.errors import RunError
from pretrain.grid import Grid
from pretrain.masters import local_shape, prepare_moments, write_back
from pretrain.tensor_file import TensorFile

MANIFEST = "manifest.json"
LATEST = "latest"
"""File in ``RUN/checkpoints`` with the name of the newest whole one, for people and scripts."""
VERSION = 1
SEAL = "sha256"
MASTER = "master"
ATTENTION_PARTS = ("query", "key", "value", "output")


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` updates."""
    return f"step-{step:08d}"


class DamagedError(RunError):
    """Files of a checkpoint are not as they were written."""


def step_of(path: Path) -> int:
    """Updates that a checkpoint's folder name stands for."""
    return int(path.name.split("-")[1])


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in ``RUN/checkpoints``, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.glob("step-*") if (path / MANIFEST).is_file())


def newest_checkpoint(folder: Path) -> Path | None:
    """The last of `list_checkpoints`, if there is one."""
    found = list_checkpoints(folder)
    return found[-1] if found else None


def sealed(manifest: dict[str, Any]) -> bytes:
    """A manifest as text, with the hash of what it says."""
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, SEAL: digest}).encode()


def manifest(
    config: Config, plan: DecayPlan, step: int, state: dict[str, Any], grid: dict[str, int]
) -> dict[str, Any]:
    """What a checkpoint says of itself, but for its files (``files``: name -> entry).

    Args:
        state: what else to remember (JSON), for example the data's identity.
        grid: sizes of the axes and the ZeRO stage that wrote it.
    """
    decays = plan.by_name
    return {
        "version": VERSION,
        "step": step,
        "state": state,
        "config": config.model_dump(mode="json"),
        "grid": grid,
        "parameters": {
            info.name: {
                "role": info.role.value,
                "layer": info.layer,
                "shape": info.shape,
                "partition_dim": info.partition_dim,
                "decay": decays[info.name],
            }
            for group in plan.groups
            for info in group.parameters
        },
        "files": {},
    }


def _unsealed(text: str) -> dict[str, Any]:
    """The inverse of `sealed`; checkpoints of the first versions have no seal."""
    manifest: dict[str, Any] = json.loads(text)
    seal = manifest.pop(SEAL, None)
    if seal not in (None, hashlib.sha256(json.dumps(manifest).encode()).hexdigest()):
        raise ValueError("its checksum differs")
    return manifest


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
            manifest = _unsealed((path / MANIFEST).read_text(encoding="utf-8"))
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
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(
                f"{path}/{MANIFEST}: damaged ({type(error).__name__}); delete this checkpoint to "
                "go on from the one before"
            ) from None
        self._places: dict[tuple[str, str], list[_Place]] = defaultdict(list)
        for file, entry in self._files.items():
            for name, (offset, numel, keys) in entry["fragments"].items():
                for key in keys:
                    place = _Place(file, entry["tensor_rank"], offset, numel)
                    self._places[name, key].append(place)
        self._open: dict[str, TensorFile] = {}
        self._checked: set[str] = set()
        self._trusted = False

    def trust(self) -> None:
        """Do not hash files again: somebody just did (`problem`)."""
        self._trusted = True

    @property
    def decays(self) -> dict[str, float]:
        """λ by parameter name, as it was when the checkpoint was written."""
        return {name: entry["decay"] for name, entry in self.parameters.items()}

    @property
    def digest(self) -> str:
        """Hash of all it holds: two runs that fork from equal ones begin equally."""
        sums = sorted(entry["sha256"] for entry in self._files.values())
        return hashlib.sha256("".join(sums).encode()).hexdigest()

    def problem(self, part: int = 0, parts: int = 1) -> str:
        """What is wrong with the files, in one line; empty if each is as it was written.

        Args:
            part, parts: look at every ``parts``-th file from ``part`` on, so that ranks share the
                reading of a large checkpoint.
        """
        for file in sorted(self._files)[part::parts]:
            try:
                self._file(file)
            except DamagedError as error:
                return str(error)
        return ""

    def keys(self, name: str) -> list[str]:
        """What is stored for a parameter: the master and the optimizer's moments."""
        return sorted(key for one, key in self._places if one == name)

    def full(self, name: str, key: str = MASTER) -> Tensor:
        """The global tensor, float32, without regard to how it was split."""
        entry = self.parameters[name]
        shape, dim = list(entry["shape"]), entry["partition_dim"]
        if dim is None or self.tensor_parallel == 1:
            return self._shard(name, key, 0, shape)
        whole = torch.empty(shape)
        for rank, part in enumerate(whole.chunk(self.tensor_parallel, dim)):
            part.copy_(self._shard(name, key, rank, list(part.shape)))
        return whole

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
                part = flat[place.offset : place.offset + place.numel]
                self._file(place.file).read_into(f"{name}/{key}", part)
                filled += place.numel
        if filled != flat.numel():
            raise RunError(f"{self.path}: {name} ({key}) is incomplete: {filled}/{flat.numel()}")
        return flat.view(shape)

    def _file(self, name: str) -> TensorFile:
        if name not in self._open:
            path, entry = self.path / name, self._files[name]
            try:
                known = self._trusted or name in self._checked
                whole = known or _sha256(path) == entry["sha256"]
            except OSError as error:
                raise DamagedError(f"{path}: cannot be read ({error.strerror})") from None
            if not whole:
                raise DamagedError(
                    f"{path}: damaged (its checksum differs); delete {self.path.name} to go on "
                    "from the checkpoint before"
                )
            self._checked.add(name)
            self._open[name] = TensorFile(path)
        return self._open[name]

    def rng_state(self, rank: int) -> Tensor | None:
        """The random state of a rank, if it wrote one."""
        name = f"rank-{rank:05d}.safetensors"
        if name not in self._files:
            return None
        state: Tensor = self._file(name).get_tensor("rng")
        return state


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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

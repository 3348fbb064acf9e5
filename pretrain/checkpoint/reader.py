"""Checkpoints: every tensor by its global name, in safetensors, readable on any grid.

A checkpoint is a folder ``step-00000100/``: one file per writing process with the fp32 masters and
optimizer moments that the process owns, and ``manifest.json``, which says where every element is.
Nothing is keyed by position, so a restore can never give a tensor the λ of another one, and nothing
is pickled. The folder is written under a temporary name and renamed: it is either complete or
absent.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import stat
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from data_pipeline.disk import NO_SUCH, NotRegularError, count, open_regular, patiently
from models.factors import Factors
from models.roles import ParameterInfo, Role
from pretrain.checkpoint.manifest import (
    MANIFEST,
    MASTER,
    DamagedError,
    UnreadableError,
    damaged,
    head_of,
    read_manifest,
    unreadable,
)
from pretrain.checkpoint.tensor_file import TensorFile
from pretrain.config.recipe import Config, parse_config
from pretrain.errors import RunError, UsageError

CHECKPOINTS = "checkpoints"
LATEST = "latest"
"""File in ``RUN/checkpoints`` with the name of the newest complete one, for people and scripts."""
RUN_ID = "run-id"
"""File in a run folder with the id that its checkpoints contain."""
ATTENTION_PARTS = ("query", "key", "value", "output")
_NAME = re.compile(r"step-([0-9]{8,18})")
_BLOCK = 8 << 20
Result = TypeVar("Result")


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` updates."""
    return f"step-{step:08d}"


def is_checkpoint_name(name: str) -> bool:
    """Whether a name has a checkpoint's form; a copy's name, such as ``step-8.bak``, has not."""
    return _NAME.fullmatch(name) is not None


def step_of(path: Path) -> int:
    """The step in a checkpoint's folder name."""
    return int(path.name.split("-")[1])


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of the run in ``RUN/checkpoints``, oldest first, without anything else there.

    Raises:
        UnreadableError: if the disk does not respond.
    """
    run = run_id_of(folder.parent)
    return [path for path in named_so(folder) if not stranger(path, run)]


def names_in(folder: Path) -> list[str]:
    """Sorted names in a folder; empty if there is no folder.

    Raises:
        UnreadableError: if the disk does not respond.
    """
    try:
        return sorted(patiently(lambda: [path.name for path in folder.iterdir()]))
    except OSError as error:
        if error.errno in NO_SUCH:
            return []
        raise unreadable(folder, error) from None


def named_so(folder: Path) -> list[Path]:
    """Paths with a checkpoint's name, by step."""
    paths = [folder / name for name in names_in(folder) if is_checkpoint_name(name)]
    return sorted(paths, key=lambda path: (step_of(path), path.name))


def run_id_of(run: Path) -> str:
    """The id of a run folder; empty if it has none yet."""
    try:
        with patiently(lambda: open_regular(run / RUN_ID)) as file:
            return file.read(100).decode(errors="replace").strip()
    except NotRegularError:
        return ""
    except OSError as error:
        if error.errno in NO_SUCH:
            return ""
        raise unreadable(run / RUN_ID, error) from None


def new_run_id() -> str:
    """Make an id for a run folder that has none."""
    return secrets.token_hex(4)


def stranger(path: Path, run: str) -> str:
    """Why a path with a checkpoint's name is not a checkpoint of this run; empty if it is.

    Args:
        run: id of the run; empty: not known.

    Raises:
        UnreadableError: if the disk does not respond.
    """
    try:
        kind = patiently(lambda: os.lstat(path)).st_mode
        if stat.S_ISLNK(kind):
            return "is a link"
        if not stat.S_ISDIR(kind):
            return "is not a folder"
        kind = patiently((path / MANIFEST).stat).st_mode
    except OSError as error:
        if error.errno in NO_SUCH:
            return f"has no {MANIFEST}"
        raise unreadable(path, error) from None
    if not stat.S_ISREG(kind):
        return f"has no {MANIFEST}"
    step, its_run = head_of(path / MANIFEST)
    if step not in (None, step_of(path)):
        return f"is of step {step}"
    if run and its_run and its_run != run:
        return "belongs to another run (--fork continues from it)"
    return ""


def fork_words(run: Path, step: int, steps: int) -> str:
    """The words that fork a run at a step, so that something is left to train.

    Args:
        steps: the last step of the recipe.
    """
    return f"--fork {run}@{step}" + f" and train.steps above {step}" * (step >= steps)


def newest_checkpoint(folder: Path) -> Path | None:
    """The last of `list_checkpoints`, if there is one."""
    checkpoints = list_checkpoints(folder)
    return checkpoints[-1] if checkpoints else None


@dataclass(frozen=True)
class _Place:
    """Where some elements of a local shard are stored."""

    file: str
    tensor_rank: int
    offset: int
    numel: int


class Checkpoint:
    """A checkpoint on disk, read element by element, whatever grid wrote it.

    Raises:
        DamagedError: if its bytes have changed since they were written.
        UnreadableError: if they cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        manifest, written = read_manifest(path)
        self.step: int = manifest.step
        self.run: str = manifest.run
        self.state: dict[str, Any] = written["state"]
        try:
            self.config: Config = parse_config(manifest.config, f"{path}/{MANIFEST}")
        except UsageError as error:
            raise UnreadableError(f"{error}; another version of this program wrote it") from None
        self.tensor_parallel: int = manifest.grid.tensor
        self.parameters: dict[str, dict[str, Any]] = written["parameters"]
        self._files: dict[str, Any] = written["files"]
        self._places: dict[tuple[str, str], list[_Place]] = defaultdict(list)
        for file, entry in self._files.items():
            for name, (offset, numel, keys) in entry["fragments"].items():
                for key in keys:
                    place = _Place(file, entry["tensor_rank"], offset, numel)
                    self._places[name, key].append(place)
        self._known: dict[str, TensorFile] = {}
        self._trusted = False

    def trust(self) -> None:
        """Do not hash files again, because `problem` has just done so."""
        self._trusted = True

    @property
    def files(self) -> dict[str, int]:
        """Its files, without the manifest, and their sizes in bytes."""
        return {name: self._files[name]["size"] for name in sorted(self._files)}

    @property
    def taken(self) -> int:
        """Number of updates of the optimizer: skipped ones do not count in Adam's corrections."""
        skipped: int = self.state.get("faults", {}).get("skipped", 0)
        return self.step - skipped

    @property
    def decays(self) -> dict[str, float]:
        """λ by parameter name, at the time when the checkpoint was written."""
        return {name: entry["decay"] for name, entry in self.parameters.items()}

    @property
    def digest(self) -> str:
        """Hash of its contents: two runs that fork from equal checkpoints begin equally."""
        sums = sorted(entry["sha256"] for entry in self._files.values())
        return hashlib.sha256("".join(sums).encode()).hexdigest()

    def problem(self, part: int = 0, parts: int = 1) -> str:
        """One line about what is wrong with the files; empty if all are unchanged.

        Args:
            part, parts: check every ``parts``-th file from ``part`` on, so that processes divide
                the reading of a large checkpoint.
        """
        for file in sorted(self._files)[part::parts]:
            try:
                self._file(file)
            except DamagedError as error:
                return str(error)
        return ""

    def keys(self, name: str) -> list[str]:
        """The stored keys of a parameter: the master and the optimizer's moments."""
        return sorted(key for parameter, key in self._places if parameter == name)

    def full(self, name: str, key: str = MASTER) -> Tensor:
        """The global tensor in float32, however it was split."""
        if name not in self.parameters:
            raise DamagedError(f"{self.path}: has no {name}, which its recipe requires")
        entry = self.parameters[name]
        shape, dim = list(entry["shape"]), entry["partition_dim"]
        if dim is None or self.tensor_parallel == 1:
            return self._shard(name, key, 0, shape)
        for place in self._places[name, key]:
            self._file(place.file)  # of the right size, before memory is allocated
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
            raise RunError(f"{self.path}: has no {info.name}; it belongs to another model")
        stored, dim = tuple(self.parameters[info.name]["shape"]), info.partition_dim
        same = stored == info.shape and dim == self.parameters[info.name]["partition_dim"]
        if same and dim is not None and size == self.tensor_parallel:
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
        """Pad vocabulary matrices with zeros as the grid needs."""
        vocabulary = self.config.model.vocabulary_size
        if info.role not in (Role.EMBEDDING, Role.HEAD) or values.shape[1:] != info.shape[1:]:
            raise RunError(
                f"{self.path}: {info.name} is {tuple(values.shape)}, but the model needs "
                f"{info.shape}"
            )
        fresh = torch.zeros(info.shape)
        fresh[:vocabulary] = values[:vocabulary]
        return fresh

    def _shard(self, name: str, key: str, tensor_rank: int, shape: list[int]) -> Tensor:
        places = [place for place in self._places[name, key] if place.tensor_rank == tensor_rank]
        files = [self._file(place.file) for place in places]  # likewise
        flat = torch.empty(int(torch.Size(shape).numel()))
        filled = 0
        for place, file in zip(places, files, strict=True):
            part = flat[place.offset : place.offset + place.numel]
            self._read(place.file, partial(file.read_into, f"{name}/{key}", part))
            filled += place.numel
        if filled != flat.numel():
            raise RunError(f"{self.path}: {name} ({key}) is incomplete: {filled}/{flat.numel()}")
        return flat.view(shape)

    def _file(self, name: str) -> TensorFile:
        """Open a file after checking that it is unchanged."""
        if name not in self._known:
            self._known[name] = self._read(name, lambda: self._checked(name))
        return self._known[name]

    def _checked(self, name: str) -> TensorFile:
        path, entry = self.path / name, self._files[name]
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size != entry["size"]:
                raise ValueError("its size differs")
            if not self._trusted and _sha256(file) != entry["sha256"]:
                raise ValueError("its checksum differs")
        return TensorFile(path)

    def _read(self, name: str, action: Callable[[], Result]) -> Result:
        """Call an action that reads a file, and return its result.

        Raises:
            DamagedError: if the file is missing or wrong although the manifest exists.
            UnreadableError: if the disk does not respond, or has lost the whole folder.
        """
        path = self.path / name
        try:
            return patiently(action, NO_SUCH - {errno.ENOENT})
        except NotRegularError:
            raise damaged(path, "not a regular file") from None
        except OSError as error:
            if error.errno in NO_SUCH and (self.path / MANIFEST).is_file():
                raise damaged(path, str(error.strerror)) from None
            raise unreadable(path, error) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(path, str(error).splitlines()[0] or type(error).__name__) from None

    def rng_state(self, rank: int) -> Tensor | None:
        """The random state of a process, if it wrote one."""
        name = f"rank-{rank:05d}.safetensors"
        if name not in self._files:
            return None
        file = self._file(name)
        state: Tensor = self._read(name, lambda: file.get_tensor("rng"))
        return state


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(_BLOCK):
        digest.update(block)
        count(len(block))
    return digest.hexdigest()

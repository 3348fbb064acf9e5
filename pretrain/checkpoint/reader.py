"""Checkpoints: every tensor by its global name, in safetensors, readable on any grid.

A checkpoint is a folder ``step-00000100/``: one file per writing process with the fp32 masters and
optimizer moments that the process owns, and ``manifest.json``, which says where every element is.
Nothing is keyed by position, so a restore can never give a tensor the λ of another one, and nothing
is pickled. The folder is written under a temporary name and renamed: it is either complete or
absent.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from data_pipeline.disk import NO_SUCH, NotRegularError, open_regular, patiently
from models.factors import Factors
from models.initial import boxes, matrix_shape
from models.roles import ParameterInfo, Role
from pretrain.checkpoint.manifest import (
    MANIFEST,
    MASTER,
    DamagedError,
    UnreadableError,
    head_of,
    piece_name,
    read_manifest,
    unreadable,
)
from pretrain.checkpoint.stored import StoredTensors
from pretrain.config.recipe import Config, parse_config
from pretrain.errors import RunError, UsageError

CHECKPOINTS = "checkpoints"
OWES_EVALUATION = "owes_evaluation"
"""Key of a checkpoint's state: a signal cut the evaluation of its step short."""
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
        self.stored = StoredTensors(path, written["files"])

    @property
    def files(self) -> dict[str, int]:
        """Its files, without the manifest, and their sizes in bytes."""
        files = self.stored.files
        return {name: files[name]["size"] for name in sorted(files)}

    @property
    def checksums(self) -> dict[str, str]:
        """The sha256 of each of `files`."""
        files = self.stored.files
        return {name: files[name]["sha256"] for name in sorted(files)}

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
        sums = sorted(entry["sha256"] for entry in self.stored.files.values())
        return hashlib.sha256("".join(sums).encode()).hexdigest()

    def trust(self) -> None:
        """Do not hash files again, because `problem` has just done so."""
        self.stored.trust()

    def problem(self, part: int = 0, parts: int = 1) -> str:
        """As `StoredTensors.problem`."""
        return self.stored.problem(part, parts)

    def keys(self, name: str) -> list[str]:
        """The stored keys of a parameter: the master and the optimizer's moments."""
        return sorted(self.stored.places.get(name, ()))

    def full(self, name: str, key: str = MASTER) -> Tensor:
        """The global tensor in float32, however it was split."""
        if name not in self.parameters:
            raise DamagedError(f"{self.path}: has no {name}, which its recipe requires")
        entry = self.parameters[name]
        shape, dim = list(entry["shape"]), entry["partition_dim"]
        if dim is None or self.tensor_parallel == 1:
            return self.stored.whole(name, key, 0, shape)
        self.stored.check(name, key)  # before memory is allocated
        whole = torch.empty(shape)
        for rank, part in enumerate(whole.chunk(self.tensor_parallel, dim)):
            part.copy_(self.stored.whole(name, key, rank, list(part.shape)))
        return whole

    def attention(self, layer: int) -> Factors:
        """The attention matrices of a layer, by head."""
        names = (f"blocks.{layer}.attention.{part}.weight" for part in ATTENTION_PARTS)
        return Factors.of_layer(self.config.model.attention_shape, *map(self.full, names))

    def local(self, info: ParameterInfo, key: str, rank: int, size: int) -> Tensor:
        """The flat shard of tensor-parallel rank ``rank`` of ``size``."""
        shards = size if info.partition_dim is not None else 1
        return self.part(info, key, rank, size, 0, info.numel // shards)

    def part(
        self, info: ParameterInfo, key: str, rank: int, size: int, low: int, high: int
    ) -> Tensor:
        """Elements ``low`` to ``high`` of a flat shard, reading little more than these.

        Args:
            info: the parameter as the model to be filled has it.
            rank, size: of tensor parallelism there.

        Raises:
            RunError: if the checkpoint has none, or one of another shape.
        """
        rows = self._rows(info)
        values = torch.empty(high - low)
        for box in boxes(info, rank, size, low, high):
            top, bottom = box.rows
            stored = max(0, min(bottom, rows) - top)  # rows below pad a vocabulary
            matrix = torch.zeros(bottom - top, box.columns[1] - box.columns[0])
            if stored:
                self._fill(info.name, key, matrix[:stored], top, box.columns)
            flat = matrix.reshape(-1)[box.low : box.high]
            values[box.place : box.place + flat.numel()] = flat
        return values

    def _rows(self, info: ParameterInfo) -> int:
        """Number of rows of a stored parameter that have values.

        Padding of a vocabulary has none, because it depends on the grid.
        """
        if info.name not in self.parameters:
            raise RunError(f"{self.path}: has no {info.name}; it belongs to another model")
        shape = tuple(self.parameters[info.name]["shape"])
        padded = info.role in (Role.EMBEDDING, Role.HEAD)
        if shape != info.shape and not (padded and shape[1:] == info.shape[1:]):
            raise RunError(f"{self.path}: {info.name} is {shape}, but the model needs {info.shape}")
        rows, _ = matrix_shape(shape)
        return rows if shape == info.shape else min(rows, self.config.model.vocabulary_size)

    def _fill(self, name: str, key: str, into: Tensor, top: int, columns: tuple[int, int]) -> None:
        """Read rows from ``top`` on, of some columns, from the stored shards."""
        dim = self.parameters[name]["partition_dim"]
        shards = self.tensor_parallel if dim is not None else 1
        stored = matrix_shape(tuple(self.parameters[name]["shape"]))
        height, width = stored[0] // (shards if dim == 0 else 1), stored[1]
        if dim == 1:
            width //= shards
        for shard in range(shards):
            above, before = (shard * height if dim == 0 else 0), (shard * width if dim == 1 else 0)
            first, last = max(top, above), min(top + len(into), above + height)
            left, right = max(columns[0], before), min(columns[1], before + width)
            if first >= last or left >= right:
                continue
            rows = self.stored.region(
                name, key, shard, (first - above) * width, (last - above) * width
            ).view(-1, width)
            into[first - top : last - top, left - columns[0] : right - columns[0]] = rows[
                :, left - before : right - before
            ]

    def rng_state(self, rank: int) -> Tensor | None:
        """The random state of a process, if it wrote one."""
        return self.stored.tensor(piece_name(rank), "rng")

"""``manifest.json`` of a checkpoint: its description, with a checksum, validated by a schema."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_pipeline.disk import NO_SUCH, NotRegularError, open_regular, patiently
from data_pipeline.files import LARGEST
from data_pipeline.strict_json import to_json
from pretrain.checkpoint.pieces import compact, expand
from pretrain.config.recipe import Config
from pretrain.decay.plan import DecayPlan
from pretrain.errors import RunError

MANIFEST = "manifest.json"
VERSION = 2
"""Version 1 lists the pieces of each file; version 2 joins them (`pretrain.checkpoint.pieces`)."""
SEAL = "sha256"
MASTER = "master"
_HEAD = 1024
"""Number of bytes that contain a manifest's first keys: version, step and run."""
_STEP = re.compile(rb'"step": ([0-9]+)')
_RUN = re.compile(rb'"run": "([^"]*)"')

Count = Annotated[int, Field(ge=0, strict=True)]
Fragment = tuple[Count, Count, list[str]]
"""First element in the local shard, number of elements, and the stored keys."""


def piece_name(rank: int) -> str:
    """Name of the file with what process ``rank`` owns."""
    return f"rank-{rank:05d}.safetensors"


class DamagedError(RunError):
    """Files of a checkpoint have changed since they were written."""


class UnreadableError(RunError):
    """A disk does not respond, or a newer program wrote this: nothing is known to be damaged."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class FileEntry(_Part):
    """One file, and the elements of tensors in it."""

    size: Count
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    tensor_rank: Count
    fragments: dict[str, Fragment]


class ParameterEntry(_Part):
    """One parameter."""

    role: str
    layer: Count | None
    shape: list[Count]
    partition_dim: Count | None
    decay: float


class GridEntry(_Part):
    """The grid that wrote it."""

    tensor: Annotated[int, Field(ge=1, strict=True)]


class StateEntry(BaseModel):
    """The state that every checkpoint has, apart from the state of the caller."""

    model_config = ConfigDict(extra="allow")
    tokenizer: str
    data: str
    eod: int | None = None
    generation: dict[str, Any] | None = None
    decay: dict[str, Any]
    initial_weights: str = ""
    jumped: list[Count] = []


class CheckpointManifest(_Part):
    """A manifest whose parts agree with each other."""

    step: Annotated[int, Field(ge=0, lt=10**18, strict=True)]
    run: str = ""
    """Id of the run that wrote it; empty in manifests of the first versions."""
    state: StateEntry
    config: dict[str, Any]
    grid: GridEntry
    parameters: dict[str, ParameterEntry]
    files: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+\.safetensors$")], FileEntry]


def describe(
    config: Config,
    plan: DecayPlan,
    step: int,
    state: dict[str, Any],
    grid: dict[str, int],
) -> dict[str, Any]:
    """The description of a checkpoint without its files (``files``: name -> entry).

    Args:
        state: further state to save (JSON), for example the data's identity.
        grid: sizes of the axes and the ZeRO stage that wrote it.
    The id of the run (``run``) is empty until it is known.
    """
    decays = plan.by_name
    return {
        "version": VERSION,
        "step": step,
        "run": "",
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


def sealed(manifest: dict[str, Any]) -> bytes:
    """JSON as text, with the hash of its contents."""
    manifest = json.loads(to_json(manifest))
    return to_json({**manifest, SEAL: _digest(manifest)}).encode()


def written_manifest(manifest: dict[str, Any]) -> bytes:
    """A manifest in the form in which it is written, with the hash of its contents."""
    return sealed({**compact(manifest), "version": VERSION})


def head_of(path: Path) -> tuple[int | None, str | None]:
    """Read step and run from a manifest's first bytes, which is fast; None if they are not there.

    Raises:
        UnreadableError: if the disk does not respond.
    """
    try:
        with patiently(lambda: open_regular(path)) as file:
            head = patiently(lambda: file.read(_HEAD))
    except NotRegularError:
        return None, None
    except OSError as error:
        if error.errno in NO_SUCH:
            return None, None
        raise unreadable(path, error) from None
    step, run = _STEP.search(head), _RUN.search(head)
    return int(step[1]) if step else None, run[1].decode(errors="replace") if run else None


def unreadable(path: Path, error: OSError) -> UnreadableError:
    """The error for a disk that does not respond."""
    return UnreadableError(
        f"{path}: cannot be read ({error.strerror}), even after some retries; nothing was changed: "
        "rerun the same command when the disk responds"
    )


def read_manifest(folder: Path) -> tuple[CheckpointManifest, dict[str, Any]]:
    """Read the manifest of a checkpoint and check that it is unchanged and consistent.

    Raises:
        UnreadableError: if there is none, it cannot be read, or a newer program wrote it.
        DamagedError: if it has changed since it was written, or its parts do not agree.
    """
    path = folder / MANIFEST
    try:
        with patiently(lambda: open_regular(path)) as file:
            text = patiently(lambda: file.read(LARGEST + 1))
    except NotRegularError:
        raise damaged(path, "not a regular file") from None
    except OSError as error:
        if error.errno in NO_SUCH:
            raise UnreadableError(f"{folder}: contains no checkpoint ({error.strerror})") from None
        raise unreadable(path, error) from None
    if len(text) > LARGEST:
        raise damaged(path, f"more than {LARGEST:,} bytes")
    try:
        written: dict[str, Any] = json.loads(text)
        if _check_seal(path, written) > 1:
            written = expand(written)
        manifest = CheckpointManifest.model_validate(written)
        _check_coverage(manifest)
    except RunError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise damaged(path, f"{place}: {first['msg'].lower()}") from None
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise damaged(path, str(error).splitlines()[0]) from None
    return manifest, written


def damaged(path: Path, why: str) -> DamagedError:
    """The error for a file that has changed since it was written."""
    return DamagedError(
        f"{path}: damaged ({why}); delete {path.parent.name} to use the checkpoint before it"
    )


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def _check_seal(path: Path, written: dict[str, Any]) -> int:
    """Check and remove the checksum, and return the version.

    The first manifests have neither a checksum nor a run.

    Raises:
        ValueError: if it is not the checksum of the contents.
    """
    seal = written.pop(SEAL, None)
    version = written.get("version")
    intact = seal == _digest(written)
    if isinstance(version, int) and version > VERSION and (intact or seal is None):
        raise UnreadableError(
            f"{path}: has format {version} of a newer version of this program, but this one reads "
            f"{VERSION}; install the newer version"
        )
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(f"version {version!r}")
    if not intact and (seal is not None or "run" in written):
        raise ValueError("its checksum differs")
    return version


def _check_coverage(manifest: CheckpointManifest) -> None:
    """Check that every element of every master and of every other stored key is stored once.

    Raises:
        ValueError: naming the tensor.
    """
    stored_pieces: dict[tuple[str, str, int], list[tuple[int, int]]] = defaultdict(list)
    for file, entry in manifest.files.items():
        stored = 0
        for name, (offset, numel, keys) in entry.fragments.items():
            if name not in manifest.parameters:
                raise ValueError(f"{file}: {name} is not a parameter")
            if len(set(keys)) != len(keys):
                raise ValueError(f"{file}: {name} occurs twice")
            stored += numel * len(keys) * 4
            for key in keys:
                stored_pieces[name, key, entry.tensor_rank].append((offset, numel))
        if stored > entry.size:
            raise ValueError(f"{file}: is smaller than its contents")
    for name, parameter in manifest.parameters.items():
        sizes = shard_sizes(parameter, manifest.grid.tensor)
        for rank, size in sizes.items():
            if size and (name, MASTER, rank) not in stored_pieces:
                raise ValueError(f"{name} is missing")
    for (name, key, rank), pieces in stored_pieces.items():
        _check_pieces(f"{name} ({key})", pieces, shard_sizes_of(manifest, name).get(rank, 0))


def _check_pieces(label: str, pieces: list[tuple[int, int]], size: int) -> None:
    end = 0
    for offset, numel in sorted(pieces):
        if offset != end:
            raise ValueError(f"{label} {'overlaps' if offset < end else 'is incomplete'}")
        end += numel
    if end != size:
        raise ValueError(f"{label} is incomplete: {end}/{size}")


def shard_sizes_of(manifest: CheckpointManifest, name: str) -> Mapping[int, int]:
    """Elements of a parameter's shard, by the tensor-parallel rank that stores it."""
    return shard_sizes(manifest.parameters[name], manifest.grid.tensor)


def shard_sizes(parameter: ParameterEntry, tensor: int) -> dict[int, int]:
    """Elements of a parameter's shard, by the tensor-parallel rank that stores it.

    Raises:
        ValueError: if it cannot be split in this way.
    """
    numel = 1
    for length in parameter.shape:
        numel *= length
    if parameter.partition_dim is None:
        return {0: numel}
    if parameter.partition_dim >= len(parameter.shape):
        raise ValueError(f"partition_dim {parameter.partition_dim} of shape {parameter.shape}")
    length = parameter.shape[parameter.partition_dim]
    if length % tensor:
        raise ValueError(f"{length} rows or columns do not split into {tensor}")
    return dict.fromkeys(range(tensor), numel // tensor)

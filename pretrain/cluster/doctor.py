"""`pretrain doctor`: the processes of an allocation check whether it is fit for a long run."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from pretrain.cluster.files_doctor import Finding, file_system, open_files
from pretrain.config.recipe import Config, code_of
from pretrain.distributed.cores import usable_cores
from pretrain.distributed.grid import Grid, Group
from pretrain.runs.environment import environment

_TOP = Path(__file__).resolve().parents[2]
_CODE = ("pretrain", "models", "data_pipeline", "launchers")
_SKEW = 1.0
"""Seconds that clocks may differ; times are used to compare logs and files."""
_MESSAGE = 16 << 20
"""Bytes of the all-reduce whose bandwidth is reported."""
_WRITTEN = 64 << 20
_SAMPLE = 1 << 20
_BYTES_PER_PARAMETER = 12
"""Bytes per parameter in a checkpoint: master and two moments, float32."""


def examine(grid: Grid, config: Config | None, run: Path, size: int = _MESSAGE) -> list[Finding]:
    """Run all checks on every process together; the findings are the same everywhere.

    Args:
        config: with a recipe, its data is compared and space for its checkpoints is checked.
        run: the run folder, which need not exist; nothing is left in it.
        size: bytes of the messages whose bandwidth is measured.
    """
    local = environment()
    findings = [
        *_alike(grid, "versions", local["versions"] | {"python": local["python"]}),
        *_requirements(grid),
        *_alike(grid, "code", code_hash()),
        *_devices(grid),
        open_files(grid),
        _clocks(grid),
        *_links(grid, size),
        *_disk(grid, run, config),
    ]
    if config is not None and config.data.path:
        findings += _alike(grid, "data", data_hash(Path(config.data.path)))
    files = code_of(config) if config is not None else []
    if files:
        findings += _alike(grid, "own code", " ".join(file.sha256[:16] for file in files))
    return findings


def as_json(findings: list[Finding]) -> list[dict[str, str]]:
    """Findings as plain data."""
    return [asdict(finding) for finding in findings]


# --- the same everywhere --------------------------------------------------------------------------


def code_hash() -> str:
    """Hash of the names and contents of this program's source files."""
    digest = hashlib.sha256()
    for package in _CODE:
        for path in sorted((_TOP / package).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                digest.update(str(path.relative_to(_TOP)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def data_hash(folder: Path) -> str:
    """Hash of a tokenised folder: its manifest, and the size and three samples of every file.

    Three megabytes per file detect another tokenisation or a truncated copy, not every flipped bit;
    the checksums beside the tokens are for that (``data.verify``).
    """
    digest = hashlib.sha256()
    try:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder)}\0{size}\0".encode())
            with path.open("rb") as file:
                for place in (0, size // 2, max(0, size - _SAMPLE)):
                    file.seek(place)
                    digest.update(file.read(_SAMPLE))
    except OSError as error:
        return f"unreadable ({error.strerror}: {error.filename})"
    return digest.hexdigest()[:16]


def _alike(grid: Grid, check: str, value: Any) -> list[Finding]:
    """Check that a value is the same on every process, and name those that differ."""
    values = grid.gather((socket.gethostname(), value))
    _, first = values[0]
    shown = first if isinstance(first, str) else _first_versions(first)
    if isinstance(first, str) and first.startswith("unreadable"):
        return [Finding(check, "fail", f"process rank 0 on {values[0][0]}: {first}")]
    for rank, (host, other) in enumerate(values):
        if other != first:
            text = other if isinstance(other, str) else _different(first, other)
            return [
                Finding(
                    check,
                    "fail",
                    f"process rank {rank} on {host} has {text}; process rank 0 has {shown}",
                )
            ]
    return [Finding(check, "ok", f"{shown}, the same on {grid.world_size} process(es)")]


def _first_versions(versions: dict[str, Any]) -> str:
    return ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "deepspeed"))


def _different(first: dict[str, Any], other: dict[str, Any]) -> str:
    return ", ".join(f"{name} {other[name]}" for name in other if other[name] != first.get(name))


def _requirements(grid: Grid, top: Path = _TOP) -> list[Finding]:
    """Check that installed versions are within the ranges of pyproject.toml.

    Args:
        top: the folder that has it if the program is not installed.
    """
    from importlib import metadata

    from packaging.requirements import Requirement

    lines = _required(top)
    if lines is None:
        text = "unknown: the program is neither installed nor beside its pyproject.toml"
        return [Finding("requirements", "warn", text)]
    wrong = []
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = ""
        if not version or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(
                f"{requirement.name} {version or 'is missing'} (needs {requirement.specifier})"
            )
    mismatches = sorted({text for texts in grid.gather(wrong) for text in texts})
    if mismatches:
        return [Finding("requirements", "warn", "; ".join(mismatches))]
    return [Finding("requirements", "ok", "installed versions are in the tested ranges")]


def _required(top: Path) -> list[str] | None:
    """Requirements of the installed package, else of the pyproject.toml in ``top``."""
    import tomllib
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.requires("rankdecay") or []
    try:
        text = (top / "pyproject.toml").read_text(encoding="utf-8")
        dependencies: list[str] = tomllib.loads(text)["project"]["dependencies"]
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return None
    return dependencies


# --- machines -------------------------------------------------------------------------------------


def _devices(grid: Grid) -> list[Finding]:
    mine: dict[str, Any] = {
        "host": socket.gethostname(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
    }
    if grid.device.type == "cuda":
        properties = torch.cuda.get_device_properties(grid.device)
        mine |= {"name": properties.name, "memory": properties.total_memory}
    devices = grid.gather(mine)
    names = {device.get("name", "CPU") for device in devices}
    hosts: dict[str, int] = {}
    for device in devices:
        hosts[device["host"]] = hosts.get(device["host"], 0) + 1
    text = f"{grid.world_size} process(es) on {len(hosts)} host(s): {', '.join(sorted(names))}"
    findings = [Finding("devices", "ok" if len(names) == 1 else "warn", text)]
    if grid.device.type == "cpu" and shutil.which("nvidia-smi"):
        findings.append(Finding("devices", "warn", "nvidia-smi exists, but torch sees no GPU"))
    for device in devices:
        if device["threads"] * hosts[device["host"]] > (device["cores"] or 1) * 1.5:
            text = (
                f"{device['host']}: {hosts[device['host']]} processes of {device['threads']} "
                f"threads share {device['cores']} cores; set OMP_NUM_THREADS"
            )
            findings.append(Finding("threads", "warn", text))
            break
    return findings


def _clocks(grid: Grid) -> Finding:
    """Compare the hosts' clocks with process rank 0's after a barrier, to the barrier's
    accuracy."""
    tries = []
    for _ in range(5):
        grid.barrier()
        times = grid.gather(time.time())
        tries.append([reading - times[0] for reading in times])
    offsets = min(tries, key=lambda attempt: max(attempt) - min(attempt))
    worst = max(range(grid.world_size), key=lambda rank: abs(offsets[rank]))
    if abs(offsets[worst]) > _SKEW:
        return Finding(
            "clocks",
            "warn",
            f"the clock of process rank {worst} is {offsets[worst]:+.1f} s off process rank 0's",
        )
    return Finding("clocks", "ok", f"within {abs(offsets[worst]) * 1e3:.1f} ms")


# --- links ----------------------------------------------------------------------------------------


def _links(grid: Grid, size: int) -> list[Finding]:
    """Latency and bandwidth of all-reduce in each kind of group; reports the slowest group."""
    if grid.world_size == 1:
        return [Finding("links", "ok", "one process: none")]
    kinds: list[tuple[str, Group, int]] = [
        ("world", dist.group.WORLD, grid.world_size),
        ("tensor", grid.tensor_group, grid.tensor),
        ("pipeline", grid.pipeline_group, grid.pipeline),
        ("data", grid.data_group, grid.data),
    ]
    findings = []
    for name, group, members in kinds:
        if members == 1:
            continue
        latency = _all_reduce(grid, group, members, 4)
        seconds = _all_reduce(grid, group, members, size)
        mine = (latency, seconds, dist.get_process_group_ranks(group))
        results = grid.gather(mine)
        right = all(result[0] >= 0 and result[1] >= 0 for result in results)
        slowest = max(results, key=lambda result: result[1])
        # What one process sends and receives in a ring (nccl-tests: busbw).
        moved = 2 * (members - 1) / members * size
        text = (
            f"all-reduce {max(result[0] for result in results) * 1e6:.0f} µs, "
            f"{moved / slowest[1] / 1e9:.2f} GB/s (slowest: process ranks "
            f"{', '.join(map(str, slowest[2][:8]))})"
        )
        fastest = min(result[1] for result in results if result[1] > 0)
        state = "ok" if slowest[1] < 3 * fastest else "warn"
        if not right:
            state, text = "fail", "an all-reduce gave a wrong sum"
        findings.append(Finding(f"{name} links", state, text))
    return findings


def _all_reduce(grid: Grid, group: Group, members: int, size: int, times: int = 5) -> float:
    """Median seconds of an all-reduce of ``size`` bytes; -1 if its sum is wrong."""
    tensor = torch.empty(max(1, size // 4), device=grid.device)
    seconds = []
    right = True
    for _ in range(times + 1):
        tensor.fill_(1.0)
        grid.barrier()
        began = time.monotonic()
        dist.all_reduce(tensor, group=group)
        if grid.device.type == "cuda":
            torch.cuda.synchronize(grid.device)
        seconds.append(time.monotonic() - began)
        right &= bool((tensor == members).all())
    return median(seconds[1:]) if right else -1.0  # the first one sets up the connection


# --- disk -----------------------------------------------------------------------------------------


def _disk(grid: Grid, run: Path, config: Config | None) -> list[Finding]:
    """Check that every process sees the run folder, and measure its disk's speed and free space."""
    folder = run
    while not folder.is_dir():
        folder = folder.parent
    token = grid.broadcast(os.urandom(8).hex())
    probe = folder / f".doctor-{token}"
    findings: list[Finding] = []
    problem, speed, free = "", 0.0, 0
    if grid.is_main:
        try:
            speed, free = _write_speed(probe), shutil.disk_usage(folder).free
        except OSError as error:
            problem = f"{folder}: {error.strerror}"
    problem, speed, free = grid.broadcast((problem, speed, free))
    if problem:
        return [Finding("disk", "fail", problem)]
    missing = [rank for rank, seen in enumerate(grid.gather(probe.exists())) if not seen]
    grid.barrier()
    if grid.is_main:
        probe.unlink(missing_ok=True)
    if missing:
        text = (
            f"{folder}: process ranks {missing[:8]} do not see what process rank 0 writes; "
            "share the folder"
        )
        findings.append(Finding("disk", "fail", text))
    needed = _needed(config) if config is not None else 0
    text = f"{folder}: {speed / 1e6:.0f} MB/s written, {free / 1e9:.1f} GB free"
    state = "ok"
    if needed:
        text += f"; kept checkpoints take {needed / 1e9:.2f} GB"
        state = "ok" if free > needed else "fail"
    findings.append(Finding("disk", state, text))
    return findings if missing else findings + file_system(grid, folder, token)


def _write_speed(probe: Path) -> float:
    block = os.urandom(1 << 20)
    began = time.monotonic()
    with probe.open("wb") as file:
        for _ in range(_WRITTEN >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return _WRITTEN / (time.monotonic() - began)


def _needed(config: Config) -> int:
    """Bytes of the checkpoints that are kept, and of the one that is being written."""
    from pretrain.training.setup import prepare

    infos = prepare(config, config.grid.tensor_parallel).infos
    checkpoint_bytes = _BYTES_PER_PARAMETER * sum(info.numel for info in infos)
    settings = config.checkpoint
    count = settings.keep or config.train.steps // config.interval("checkpoint")
    if settings.keep_every and settings.keep:
        count += config.train.steps // settings.keep_every
    return checkpoint_bytes * (count + 1 + settings.keep_best)

"""How the processes of a job connect, and exchange messages apart from the collectives.

The contents of torch's store are unpickled, so they can run code, and the store has no password. On
one machine, where `launchers.team` starts the processes, the store is a file in a folder that only
this user can enter. Between machines, process rank 0 listens only on the address that the others
are given.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from data_pipeline.children import hearing_signals
from data_pipeline.files import write_aside
from pretrain.distributed.jobs import CONNECTED, MEETING
from pretrain.errors import MachineError, UsageError

_FIRST_LINE, _NEXT_LINE = 5.0, 60.0
"""Seconds of waiting before a line says so, and between two such lines."""
_SHORTEST, _LONGEST = 0.005, 0.25
"""Seconds between two looks who has come: few at first, since all usually start together."""
_Result = TypeVar("_Result")


class Board(Protocol):
    """Short texts by key, visible to every process."""

    def set(self, key: str, value: str) -> Any:
        """Replace the text of a key."""

    def get(self, key: str) -> Any:
        """The text of a key (bytes or str); if there is none: empty, or waits and raises."""


def place_of_process(environment: Mapping[str, str]) -> tuple[int, int]:
    """This process's rank, and the number of processes, as a launcher has set them.

    Raises:
        UsageError: naming the variable that is missing or wrong.
    """
    size = _number(environment, "WORLD_SIZE", 1) if "WORLD_SIZE" in environment else 1
    if size == 1:
        return 0, 1
    rank = _number(environment, "RANK", 0, size - 1)
    if MEETING not in environment:
        _number(environment, "MASTER_PORT", 1, 65535)
        if not environment.get("MASTER_ADDR"):
            raise UsageError(_NOT_SET.format("MASTER_ADDR"))
    return rank, size


_NOT_SET = (
    "{} is not set, but WORLD_SIZE is more than 1; a launcher sets it (torchrun, srun, mpirun), or "
    "use --processes on one machine"
)


def _number(environment: Mapping[str, str], name: str, least: int, most: int = 1 << 20) -> int:
    text = environment.get(name, "")
    if not text:
        raise UsageError(_NOT_SET.format(name))
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise UsageError(f"{name}={text}: must be a whole number from {least} to {most}")
    return number


@dataclass
class Awaited:
    """What this process waits for, in words; empty while another process says it."""

    text: str = ""


def meeting(
    action: Callable[[], _Result], size: int, device: torch.device, awaited: Awaited | None = None
) -> _Result:
    """Do something that waits for other processes inside a library, and handle signals meanwhile.

    Args:
        size: number of processes; one has nobody to wait for and needs no thread.
        device: of this process; each thread chooses its GPU.
        awaited: is printed after a few seconds, and then every minute.
    """
    if size == 1:
        return action()
    line_at = time.monotonic() + _FIRST_LINE

    def on_device() -> _Result:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return action()

    def tell() -> None:
        nonlocal line_at
        if awaited and awaited.text and time.monotonic() >= line_at:
            print(f"waiting for {awaited.text}", file=sys.stderr, flush=True)
            line_at = time.monotonic() + _NEXT_LINE

    return hearing_signals(on_device, tell)


def open_store(rank: int, size: int, timeout: timedelta, awaited: Awaited | None = None) -> Any:
    """The store that is used to make a process group; returns when all processes have opened it.

    Args:
        awaited: is kept up to date.

    Raises:
        MachineError: if not all of them came in time.
    """
    if size == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    awaited = awaited or Awaited()
    folder = os.environ.get(MEETING)
    if folder:
        store = dist.FileStore(str(Path(folder) / "store"), size)  # type: ignore[attr-defined]
    else:
        store = _network_store(rank, size, timeout, awaited)
    _wait_for_all(store, rank, size, timeout, awaited)
    return store


def _network_store(rank: int, size: int, timeout: timedelta, awaited: Awaited) -> Any:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun's agent may already have opened it.
    listens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    listener = _listen(host, port) if listens else None
    extra = {"master_listen_fd": listener.detach()} if listener else {"multi_tenant": True}
    if not listens and os.environ.get("LOCAL_RANK", "0") == "0":  # one line for each machine
        awaited.text = f"process rank 0 at {host}:{port} (MASTER_ADDR and MASTER_PORT)"
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host, port, size, listens, timeout=timeout, wait_for_workers=False,
            **(extra if listens else {}),
        )  # fmt: skip
    except RuntimeError as error:
        if listens and "EADDRINUSE" in str(error):
            raise MachineError(
                f"MASTER_PORT={port} is in use here: by another process with RANK=0, or by another "
                "job; give every process its own RANK, or choose another port"
            ) from None
        raise
    awaited.text = ""
    return store


def _wait_for_all(store: Any, rank: int, size: int, timeout: timedelta, awaited: Awaited) -> None:
    """Wait until every process rank has come to the store, with process rank 0 keeping count.

    The count is asked for again and again: torch would log every wait that ends without success.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    place = dist.PrefixStore(f"meeting/{attempt}", store)  # type: ignore[attr-defined]
    if place.add(f"rank/{rank}", 1) == 1:  # otherwise a supervisor has started it again
        place.add("came", 1)
    limit, pause = time.monotonic() + timeout.total_seconds(), _SHORTEST
    while (came := place.add("came", 0)) < size:
        if rank == 0:
            awaited.text = f"{size - came} of {size} processes"
        if time.monotonic() > limit:
            raise MachineError(
                f"{size - came} of {size} processes did not come within "
                f"{timeout.total_seconds() / 60:.3g} minutes: start the same command for every "
                "process rank, or read in their output why they ended; then rerun"
            )
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST)
    awaited.text = ""


def tell_connected(rank: int) -> None:
    """Tell the launcher on this machine that a process rank waits for no other any more."""
    folder = os.environ.get(MEETING)
    if folder:
        (Path(folder) / CONNECTED.format(rank)).touch()


def open_board(size: int, timeout: timedelta) -> Board | None:
    """A board with its own connection, separate from the collectives' store; None for one
    process."""
    if size == 1:
        return None
    folder = os.environ.get(MEETING)
    if folder:
        return FolderBoard(Path(folder))
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
    except (KeyError, ValueError, RuntimeError):
        return None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    board: Board = dist.PrefixStore(f"watchdog/{attempt}", store)  # type: ignore[attr-defined]
    return board


class FolderBoard:
    """A board with one file per key: a store in a file would grow with every replaced text."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def set(self, key: str, value: str) -> None:
        """Replace the text of a key."""
        write_aside(self._folder / f"board-{key}", value.encode())

    def get(self, key: str) -> bytes:
        """The text of a key; empty if nobody has written it yet."""
        try:
            return (self._folder / f"board-{key}").read_bytes()
        except FileNotFoundError:
            return b""


def _listen(host: str, port: int) -> socket.socket | None:
    """A socket that listens only on the address of ``host``.

    It is None if that would exclude other processes: the name belongs to another machine (a service
    in front of this one), or it resolves to a loopback address while processes run elsewhere.
    """
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        ):
            if _is_loopback(address[0]) and not _on_one_machine(host):
                return None
            listener = socket.socket(family, kind, protocol)
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
                listener.listen(2048)
            except OSError:
                listener.close()
                continue
            return listener
    return None


def _is_loopback(address: str | int) -> bool:
    text = str(address)
    return text.startswith("127.") or text == "::1"


def _on_one_machine(host: str) -> bool:
    """Whether all processes run on this machine, according to the launcher or the address."""
    if host in ("localhost", "::1") or host.startswith("127.0.0."):
        return True
    local_size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    return local_size is not None and local_size == os.environ.get("WORLD_SIZE")

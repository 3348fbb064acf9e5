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
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from data_pipeline.files import write_aside
from pretrain.distributed.jobs import CONNECTED, MEETING


class Board(Protocol):
    """Short texts by key, visible to every process."""

    def set(self, key: str, value: str) -> Any:
        """Replace the text of a key."""

    def get(self, key: str) -> Any:
        """The text of a key (bytes or str); if there is none: empty, or waits and raises."""


def open_store(rank: int, size: int, timeout: timedelta) -> Any:
    """The store that is used to make a process group."""
    if size == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    folder = os.environ.get(MEETING)
    if folder:
        return dist.FileStore(str(Path(folder) / "store"), size)  # type: ignore[attr-defined]
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun's agent may already have opened it.
    listens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    listener = _listen(host, port) if listens else None
    extra = {"master_listen_fd": listener.detach()} if listener else {"multi_tenant": True}
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, port, size, listens, timeout=timeout, **(extra if listens else {})
    )


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

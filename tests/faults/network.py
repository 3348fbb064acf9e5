"""Two hosts on this machine: network namespaces joined by a cable (a veth pair)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.tools import environment

ADDRESSES = ("10.77.0.1", "10.77.0.2")


def reason_to_skip() -> str:
    """Why namespaces cannot be made here, or nothing."""
    missing = [name for name in ("ip", "tc") if not shutil.which(name, path=_path())]
    if missing:
        return f"iproute2 is not installed here ({', '.join(missing)})"
    if os.geteuid() != 0:
        return "network namespaces take root"
    done = subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False)
    return "" if done.returncode == 0 else "network namespaces are not allowed here"


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


class Hosts:
    """Two namespaces; made on entry, and gone on exit."""

    def __init__(self, number: int) -> None:
        self.names = [f"rd{number}a", f"rd{number}b"]

    def __enter__(self) -> Hosts:
        first, second = self.names
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", f"v{first}", "type", "veth", "peer", "name", f"v{second}")
        for name, address in zip(self.names, ADDRESSES, strict=True):
            ip("link", "set", f"v{name}", "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"v{name}")
            ip("-n", name, "link", "set", f"v{name}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, env=_environment())

    def pull(self) -> None:
        """Pull the cable."""
        ip("-n", self.names[1], "link", "set", f"v{self.names[1]}", "down")

    def plug(self) -> None:
        """Put it back."""
        ip("-n", self.names[1], "link", "set", f"v{self.names[1]}", "up")

    def slow(self, milliseconds: int) -> None:
        """Every packet takes so long, one way."""
        for name in self.names:
            subprocess.run(
                ["ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", f"v{name}", "root",
                 "netem", "delay", f"{milliseconds}ms"],
                check=True, env=_environment(),
            )  # fmt: skip

    def start(self, host: int, words: list[str], log: Path) -> subprocess.Popen[bytes]:
        """One process of two on a host, as a shell on that host would start it."""
        variables = {
            **environment(), "PATH": _path(), "RANK": str(host), "WORLD_SIZE": "2",
            "LOCAL_RANK": "0", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29511",
            "GLOO_SOCKET_IFNAME": f"v{self.names[host]}",
        }  # fmt: skip
        with log.open("ab") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], *words],
                env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, env=_environment())


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": _path()}

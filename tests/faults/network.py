"""Two hosts on this machine: network namespaces joined by a cable (a veth pair)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.tools import environment

ADDRESSES = ("10.77.0.1", "10.77.0.2")


def reason_to_skip() -> str:
    """Why namespaces cannot be made here, or nothing."""
    if not shutil.which("ip", path=_path()):
        return "iproute2 is not installed here"
    if os.geteuid() != 0:
        return "network namespaces take root"
    done = subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False)
    return "" if done.returncode == 0 else "network namespaces are not allowed here"


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


class Hosts:
    """Two namespaces; made on entry, and gone on exit."""

    def __init__(self, number: int, milliseconds: int = 0) -> None:
        self.names = [f"rd{number}a", f"rd{number}b"]
        self._milliseconds = milliseconds
        self._relay: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Hosts:
        first, second = self.names
        for name in self.names:
            ip("netns", "add", name)
        if self._milliseconds and not _has_netem():
            self._start_relay()
        else:
            ip("link", "add", f"v{first}", "type", "veth", "peer", "name", f"v{second}")
            for name in self.names:
                ip("link", "set", f"v{name}", "netns", name)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"v{name}")
            ip("-n", name, "link", "set", f"v{name}", "up")
            ip("-n", name, "link", "set", "lo", "up")
            if self._milliseconds and self._relay is None:
                delay = f"{self._milliseconds}ms"
                tc(name, "qdisc", "add", "dev", f"v{name}", "root", "netem", "delay", delay)
        return self

    def _start_relay(self) -> None:
        """Taps instead of a veth pair, and a process that is the slow cable."""
        words = [word for name in self.names for word in (name, f"v{name}")]
        script = Path(__file__).with_name("relay.py")
        self._relay = subprocess.Popen(
            [sys.executable, str(script), *words, str(self._milliseconds)], stdout=subprocess.PIPE
        )
        assert self._relay.stdout is not None and self._relay.stdout.readline() == b"ready\n"

    def __exit__(self, *_: object) -> None:
        if self._relay is not None:
            self._relay.kill()
            self._relay.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, env=_environment())

    def pull(self) -> None:
        """Pull the cable."""
        ip("-n", self.names[1], "link", "set", f"v{self.names[1]}", "down")

    def plug(self) -> None:
        """Put it back."""
        ip("-n", self.names[1], "link", "set", f"v{self.names[1]}", "up")

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


def tc(namespace: str, *words: str) -> None:
    subprocess.run(["ip", "netns", "exec", namespace, "tc", *words], check=True, env=_environment())


def _has_netem() -> bool:
    """Whether this kernel can delay packets by itself."""
    words = ["unshare", "-n", "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
    done = subprocess.run(words, capture_output=True, check=False, env=_environment())
    return done.returncode == 0


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": _path()}

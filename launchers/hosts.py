"""A run over the hosts of a file: DeepSpeed's launcher, or mpirun."""

from __future__ import annotations

from pathlib import Path

from launchers.site import Site
from pretrain.errors import UsageError


def read_hosts(path: Path) -> dict[str, int]:
    """Hosts and their slots, in the order of the file (``HOST slots=N`` a line).

    Raises:
        UsageError: naming the file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"{path}: cannot read the hosts ({error.strerror})") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, _, slots = (words[1] if len(words) > 1 else "slots=1").partition("=")
        if len(words) > 2 or name != "slots" or not slots.isdigit() or words[0] in hosts:
            raise UsageError(f"{path}:{number}: {line.strip()!r} is not `HOST slots=N`, each once")
        hosts[words[0]] = int(slots)
    if not hosts:
        raise UsageError(f"{path}: names no host; a line is `HOST slots=N`")
    return hosts


def deepspeed_command(site: Site, words: list[str], hosts: dict[str, int]) -> list[str]:
    """`deepspeed --hostfile …`, as words for the system; it reaches the hosts over ssh.

    DeepSpeed hands on variables that begin with NCCL, UCX or PYTHON, and those of the file that
    ``DS_ENV_FILE`` names; the site's are written there by `pretrain launch`.
    """
    return [
        site.interpreter(in_image=False), "-m", "deepspeed.launcher.runner",
        "--hostfile", site.hosts.file, "--launcher", site.hosts.launcher,
        "--master_addr", next(iter(hosts)), "--master_port", str(site.port),
        "--module", "pretrain", *words,
    ]  # fmt: skip


def mpi_command(site: Site, words: list[str], hosts: dict[str, int]) -> list[str]:
    """`mpirun …` (Open MPI), as words for the system."""
    variables = {
        "MASTER_ADDR": next(iter(hosts)) if hosts else "127.0.0.1",
        "MASTER_PORT": str(site.port),
        **site.variables,
    }
    passed = [word for name, value in variables.items() for word in ("-x", f"{name}={value}")]
    spread = ["--hostfile", site.hosts.file] if hosts else []
    count = sum(hosts.values()) or site.nodes * site.processes
    python = [site.interpreter(in_image=False), "-m", "pretrain", *words]
    return [*site.hosts.mpirun, "-np", str(count), *spread, *passed, *python]

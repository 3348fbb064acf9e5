"""A run on the hosts of a hosts file: DeepSpeed's launcher, or mpirun."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from data_pipeline.files import read_small
from launchers.local import program
from launchers.site import Site
from pretrain.errors import UsageError


def read_hosts(path: Path) -> dict[str, int]:
    """Hosts and their slots, in the order of the file (``HOST slots=N`` a line).

    Raises:
        UsageError: naming the file and line.
    """
    try:
        lines = read_small(path).decode().splitlines()
    except OSError as error:
        raise UsageError(f"{path}: cannot read the hosts ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, _, slots = (words[1] if len(words) > 1 else "slots=1").partition("=")
        if len(words) > 2 or name != "slots" or not slots.isdigit() or words[0] in hosts:
            raise UsageError(
                f"{path}:{number}: {line.strip()!r} is not `HOST slots=N`, with each host once"
            )
        hosts[words[0]] = int(slots)
    if not hosts:
        raise UsageError(f"{path}: names no host; write one `HOST slots=N` per line")
    first = next(iter(hosts))
    if len(hosts) > 1 and (first in ("localhost", "::1") or first.startswith("127.")):
        raise UsageError(
            f"{path}: processes connect to the first host, but {first} is a different machine on "
            "each host; use the name by which the others reach it"
        )
    return hosts


def deepspeed_command(site: Site, words: list[str], hosts: dict[str, int]) -> list[str]:
    """The command `deepspeed --hostfile …` as a list of arguments; it reaches the hosts over ssh.

    DeepSpeed passes on variables that begin with NCCL, UCX or PYTHON, and those of the file that
    ``DS_ENV_FILE`` names. `pretrain launch` writes the site's variables to that file.
    """
    if site.hosts.launcher == "pdsh" and len(hosts) > 1:
        _check_folder()
        words = [_for_pdsh(word) for word in words]
    return [
        site.interpreter(in_image=False), "-P", "-m", "deepspeed.launcher.runner",
        "--hostfile", site.hosts.file, "--launcher", site.hosts.launcher,
        "--master_addr", next(iter(hosts)), "--master_port", str(site.port),
        "--module", "pretrain", *words,
    ]  # fmt: skip


def _check_folder() -> None:
    folder = str(Path.cwd())
    if shlex.quote(folder) != folder:
        raise UsageError(
            f"{folder!r}: DeepSpeed's launcher changes into the current folder without quoting it; "
            "start from a folder whose path has only letters, digits and ._-/"
        )


def _for_pdsh(word: str) -> str:
    """Quote a word so that the shell of another host leaves it unchanged.

    DeepSpeed's launcher puts double quotes around words with a blank, and none around others.

    Raises:
        UsageError: for a word that double quotes do not protect.
    """
    if " " not in word:
        return shlex.quote(word)
    if re.search(r"[$`\\!\n]", word):
        raise UsageError(
            f"{word!r}: DeepSpeed's launcher cannot pass on a word with a blank and one of "
            "$ ` \\ !; put it into the recipe, or use --on mpi or slurm"
        )
    return word


def exports(variables: dict[str, str]) -> str:
    """Lines of NAME=VALUE for ``DS_ENV_FILE``, which DeepSpeed exports in double quotes.

    Raises:
        UsageError: for values that double quotes do not protect.
    """
    for name, value in variables.items():
        if re.search(r"[\"$`\\!\n]", value) or value != value.strip():
            raise UsageError(
                f"environment.{name}: DeepSpeed's launcher cannot pass on a value with one of "
                '" $ ` \\ !, or a blank at its end; set it on the hosts, or use --on mpi or slurm'
            )
    return "".join(f"{name}={value}\n" for name, value in variables.items())


def mpi_command(site: Site, words: list[str], hosts: dict[str, int]) -> list[str]:
    """The command `mpirun …` (Open MPI) as a list of arguments."""
    if site.nodes > 1 and not hosts and "MASTER_ADDR" not in os.environ:
        raise UsageError(
            "hosts.file: missing in the site file; with --on mpi on several nodes, processes "
            "connect to its first host (or export MASTER_ADDR)"
        )
    first = next(iter(hosts)) if hosts else os.environ.get("MASTER_ADDR", "127.0.0.1")
    meeting = {"MASTER_ADDR": first, "MASTER_PORT": str(site.port), "PYTHONSAFEPATH": "1"}
    passed = [word for name, value in meeting.items() for word in ("-x", f"{name}={value}")]
    # Only the names: mpirun takes the values from its own environment, and `ps` shows none.
    passed += [word for name in site.variables for word in ("-x", name)]
    spread = ["--hostfile", site.hosts.file] if hosts else []
    count = sum(hosts.values()) or site.nodes * site.processes
    python = [*program(site.interpreter(in_image=False)), *words]
    return [*site.hosts.mpirun, "-np", str(count), *spread, *passed, *python]

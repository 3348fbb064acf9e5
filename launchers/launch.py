"""`pretrain launch`: a recipe and a site become a job, a manifest or a command."""

from __future__ import annotations

import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from data_pipeline.disk import naming
from data_pipeline.files import held
from launchers import batch, cloud, hosts, local
from launchers.site import Site, load_site
from pretrain.config.recipe import Config, load_config
from pretrain.config.urls import without_secrets
from pretrain.decay.lengths import say_remarks
from pretrain.errors import UsageError

PLACES = ("local", "slurm", "hostfile", "mpi", "kubernetes", "skypilot")
_ENVIRONMENT_FILE = "environment"


@dataclass(frozen=True)
class Launch:
    """What to run, and where."""

    recipe: Path
    overrides: list[str]
    run: Path
    site: Site
    fork: str | None = None
    code: tuple[Path, ...] = ()

    @property
    def folder(self) -> Path:
        """The folder that keeps the rendered files."""
        return self.run / "launch"

    def words(self, on_nodes: bool = True) -> list[str]:
        """The arguments of `pretrain`.

        Args:
            on_nodes: whether the nodes see this machine's paths (in an image they do not).
        """
        run, recipe = (self.run, self.recipe)
        if on_nodes:
            run, recipe = run.absolute(), recipe.absolute()
        fork = ["--fork", self.fork] if self.fork else []
        files = [file.absolute() if on_nodes else file for file in self.code]
        code = [word for file in files for word in ("--code", str(file))]
        return ["train", str(recipe), *self.overrides, "--out", str(run), *fork, *code]


def launch(
    recipe: Path,
    overrides: list[str],
    on: str,
    site_file: Path | None,
    nodes: int | None,
    processes: int | None,
    run: Path | None,
    fork: str | None,
    show: bool,
    code: list[Path],
    announce: Callable[[Config, Site, int], None] | None = None,
) -> int:
    """Check a recipe against a site and start it there.

    Args:
        on: one of `PLACES`.
        code: files of the user's own that the recipe may run (`--code`).
        show: print what would be started, and start nothing.
        announce: called with the recipe, the site and the number of processes before the start.

    Returns:
        The exit code of the run if it runs on this machine, else 0 after it was submitted.

    Raises:
        UsageError: if the recipe, the site or their combination is wrong.
        RunError: if the scheduler refuses.
    """
    if on not in PLACES:
        raise UsageError(f"--on: {on!r} is not one of {', '.join(PLACES)}")
    site = load_site(site_file, {"nodes": nodes, "processes_per_node": processes})
    job = Launch(recipe, overrides, run or Path("runs") / recipe.stem, site, fork, tuple(code))
    config = load_config(recipe, overrides, code)
    say_remarks([config])
    _check_secrets(config, overrides)
    machines = hosts.read_hosts(Path(site.hosts.file)) if site.hosts.file else {}
    if on == "hostfile" and not machines:
        raise UsageError("hosts.file: missing in the site file; --on hostfile needs it")
    sizes = [count * site.processes for count in site.sizes]
    if on in ("hostfile", "mpi") and machines:
        sizes = [sum(machines.values())]
    for size in sizes:
        _check_size(config, size)
    if announce is not None:
        announce(config, site, sizes[-1])
    if on in ("local", "hostfile", "mpi"):
        return _start_here(job, on, machines, show)
    return _hand_over(job, on, show)


def _check_secrets(config: Config, overrides: list[str]) -> None:
    """Refuse a secret among the arguments: every user of the machine can read command lines."""
    mirror = config.checkpoint.mirror
    if without_secrets(mirror) != mirror and any("mirror" in word for word in overrides):
        raise UsageError(
            f"checkpoint.mirror: {without_secrets(mirror)}: other users of the machine could read "
            "its secret on the job's command line; write ${NAME} there, and set NAME in the "
            "site's environment"
        )


def _check_size(config: Config, processes: int) -> None:
    """Refuse a grid or batch that does not divide: the job would end at its start."""
    from pretrain.distributed.grid import check_grid

    data = check_grid(config.grid, processes)
    if config.train.global_batch % data:
        raise UsageError(
            f"train.global_batch: {config.train.global_batch} sequences cannot be divided among "
            f"{data} data-parallel ranks ({processes} processes); change nodes, the grid or the "
            "batch"
        )


def _start_here(job: Launch, on: str, machines: dict[str, int], show: bool) -> int:
    site = job.site
    words = job.words()
    variables = dict(site.variables)
    if on == "local":
        if site.nodes > 1:
            raise UsageError(
                f"nodes: {site.nodes} nodes cannot be used with --on local; use slurm or hostfile"
            )
        command = local.command(words, site.processes, site.restarts)
        variables = {**local.start_environment(site.processes), **variables}
    elif on == "mpi":
        command = hosts.mpi_command(site, words, machines)
    elif on == "hostfile":
        command = hosts.deepspeed_command(site, words, machines)
        file = job.folder.absolute() / _ENVIRONMENT_FILE
        if variables and not show:
            _write_secret(file, hosts.exports(variables))
        variables["DS_ENV_FILE"] = str(file)
    else:
        raise NotImplementedError(on)
    if show:
        print(shlex.join(command))
        return 0
    environment = {**local.child_environment(), **variables}
    return subprocess.run(command, env=environment, check=False).returncode


def _write_secret(path: Path, text: str) -> None:
    """Write a file that may hold secrets: from its first byte on, only the user can read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with naming(path), os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


_CLOUDS = {"kubernetes": cloud.kubernetes, "skypilot": cloud.skypilot}
"""What makes the file of a place that a person submits to."""


def _hand_over(job: Launch, on: str, show: bool) -> int:
    name = cloud.object_name(job.run)
    if on == "slurm":
        # Options of a batch script end at a blank; the log's folder must exist before the job.
        if any(mark in str(job.run.absolute()) for mark in "%\\\n\r"):
            raise UsageError(
                f"--out: {str(job.run)!r}: Slurm allows no %, \\ or new line in a log's path"
            )
        variables = job.folder.absolute() / _ENVIRONMENT_FILE
        text = batch.render(job.site, job.words(), job.run.absolute(), Path.cwd(), variables)
        file = job.folder / "slurm.sh"
    else:
        tree = _CLOUDS[on](job.site, job.words(on_nodes=False), name)
        text = yaml.safe_dump(tree, sort_keys=False)
        file = job.folder / f"{on}.yaml"
    if show:
        print(text, end="")
        return 0
    with held(job.folder):  # the submitted script is exactly the one written here
        file.parent.mkdir(parents=True, exist_ok=True)
        (job.run / "logs").mkdir(exist_ok=True)
        if on == "slurm" and job.site.variables:
            _write_secret(job.folder / _ENVIRONMENT_FILE, batch.shell_file(job.site.variables))
        _write_secret(file, text)
        number = batch.submit(file) if on == "slurm" else None
    if on == "slurm":
        print(f"submitted: job {number}; logs: {job.run}/logs; squeue --job {number}")
    elif on == "kubernetes":
        print(f"written: {file}; start it with: kubectl apply -f {file}")
    else:
        secrets = "".join(f" --secret {name}" for name in job.site.skypilot.secrets)
        print(f"written: {file}; start it with: sky jobs launch{secrets} {file}")
    sys.stdout.flush()
    return 0

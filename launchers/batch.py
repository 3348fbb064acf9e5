"""A run as one Slurm job: warned before its time limit, requeued, with a log per process."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

from launchers import local
from launchers.site import Site
from pretrain.errors import TRY_AGAIN, RunError, UsageError

_LOOP = """
run={run}
mkdir -p "$run/logs"
node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# This is the first node. Its name may resolve to a loopback address (127.0.1.1 on Debian), which
# other nodes cannot reach. So take the first address that others can reach, if there is one.
addresses() {{
  getent ahosts "$node" | awk '{{print $1}}'
  given=$(scontrol --oneliner show node "$node" | tr ' ' '\\n' | sed -n 's/^NodeAddr=//p')
  getent ahosts "$given" | awk '{{print $1}}'
  hostname -I | tr ' ' '\\n'
  echo 127.0.0.1
}}
known=$(addresses 2>/dev/null | grep .)
address=$(echo "$known" | grep -v -e '^127[.]' -e '^::1$' -e '^fe80:' | head -n 1)
export MASTER_ADDR="${{address:-$(echo "$known" | head -n 1)}}"
export MASTER_PORT=$((20000 + SLURM_JOB_ID * 7 % 20000))
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-${{SLURM_CPUS_PER_TASK:-1}}}}"

step() {{
  srun --wait=60 --kill-on-bad-exit=0 --open-mode=append "$@"
}}
newest() {{ cat "$run/checkpoints/latest" 2>/dev/null || echo none; }}
say() {{ echo "launch $(date +%FT%T): $*"; }}
# Seconds to the job's time limit; a large number if Slurm does not report it.
left() {{ echo $((${{SLURM_JOB_END_TIME:-9999999999}} - $(date +%s))); }}
{doctor}
# A process may be killed by a signal (then it is restarted here) or ask for another start (exit
# code {again}: warned, hung, or a peer is lost; then a new allocation may leave out a bad node).
starts=0
while :; do
  # Another port each time: the previous one may still be in use.
  export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + starts + 1) % 20000))
  say "start on $SLURM_JOB_NUM_NODES node(s) from $(newest), rendezvous $MASTER_ADDR:$MASTER_PORT"
  step --output="$run/logs/rank-%t.log" {words}
  code=$?
  [ "$code" -eq 0 ] && {{ say "complete"; exit 0; }}
  if [ "$code" -eq {again} ]; then break; fi
  # The end of the allocation killed a process: another start would be killed too.
  if [ "$code" -ge 128 ] && [ "$(left)" -le {warning} ]; then break; fi
  starts=$((starts + 1))
  if [ "$code" -lt 128 ] || [ "$starts" -gt {restarts} ]; then
    say "ended with exit code $code; see $run/logs"
    exit "$code"
  fi
  say "a process was killed (exit code $code); restart $starts of {restarts}"
done

# A job that makes no progress from one allocation to the next is not requeued for ever.
record="$run/logs/requeued-from"
newest >> "$record"
if [ "$(tail -n 3 "$record" | wc -l)" -eq 3 ] && [ "$(tail -n 3 "$record" | uniq | wc -l)" -eq 1 ]
then
  say "three allocations without a new checkpoint ($(newest)): not requeued; see $run/logs"
  exit {again}
fi
say "requeued from $(newest)"
scontrol requeue "$SLURM_JOB_ID" || exit {again}
"""


def render(site: Site, words: list[str], run: Path, folder: Path, environment: Path) -> str:
    """The batch script of a run.

    Args:
        words: arguments of `pretrain`.
        run: the run folder; the logs of the processes go to ``run/logs``.
        folder: the job's working directory.
        environment: file with the site's variables (`shell_file`), if it has any.
    """
    settings = site.slurm
    nodes = f"{site.min_nodes}-{site.nodes}" if site.min_nodes else str(site.nodes)
    options: dict[str, str | int] = {
        "job-name": f"rankdecay-{run.name}",
        "nodes": nodes,
        "ntasks-per-node": site.processes,
        "cpus-per-task": site.cpus_per_process,
        "gpus-per-node": site.gpus_per_node,
        "mem": settings.memory,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "time": settings.time,
        "signal": f"USR1@{settings.warning}",
        "chdir": str(folder),
        "output": f"{run}/logs/job-%j.log",
        "open-mode": "append",
        **settings.options,
    }
    head = [f"#SBATCH --{name}={_quoted(name, str(value))}" for name, value in options.items()
            if value]  # fmt: skip
    # The values may be secrets: they are in a separate file, which only the user can read.
    values = [f". {shlex.quote(str(environment))}"] if site.variables else []
    program = [*local.program(site.interpreter(_in_image(site))), *words]
    srun = _srun_options(site)
    checked_words = words[1 : words.index("--out") + 2]
    checked = [*local.program(program[0]), "doctor", *checked_words]
    doctor = f"step {shlex.join([*srun, *_contained(site, checked)])} || exit\n"
    body = _LOOP.format(
        run=shlex.quote(str(run)),
        again=TRY_AGAIN,
        restarts=site.restarts,
        warning=settings.warning,
        doctor=doctor if site.doctor else "",
        words=shlex.join([*srun, *_contained(site, program)]),
    )
    return "\n".join(
        [
            "#!/bin/bash",
            *head,
            "#SBATCH --requeue",
            "set -u",
            "export PYTHONSAFEPATH=1",
            *site.setup,
            *values,
            body,
        ]
    )


def shell_file(variables: dict[str, str]) -> str:
    """Lines that export the variables in a shell."""
    lines = (f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
    return "".join(lines)


def _quoted(name: str, value: str) -> str:
    """Quote a value for sbatch, which reads an option in a script up to a blank.

    Raises:
        UsageError: if no option can hold the value.
    """
    if any(mark in value for mark in "\n\r\0"):
        raise UsageError(f"slurm: --{name}={value!r}: an option must be one line")
    if re.fullmatch(r"[\w.,:/@=+%^-]+", value, re.ASCII):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _in_image(site: Site) -> bool:
    return site.container.kind != "none"


def _srun_options(site: Site) -> list[str]:
    # A step does not inherit this from its job.
    options = [f"--cpus-per-task={site.cpus_per_process}"] if site.cpus_per_process else []
    if site.container.kind == "pyxis":
        options.append(f"--container-image={site.container.image}")
        if site.container.mounts:
            options.append(f"--container-mounts={','.join(site.container.mounts)}")
    return options


def _contained(site: Site, program: list[str]) -> list[str]:
    if site.container.kind != "apptainer":
        return program
    binds = [word for mount in site.container.mounts for word in ("--bind", mount)]
    gpus = ["--nv"] if site.gpus_per_node else []
    return ["apptainer", "exec", *gpus, *binds, site.container.image, *program]


def submit(script: Path) -> str:
    """Submit a batch script to Slurm and return the job's number.

    Raises:
        RunError: with sbatch's message.
    """
    if shutil.which("sbatch") is None:
        raise RunError(
            f"sbatch: not found on this machine; submit on a machine that has it: sbatch {script}"
        )
    done = subprocess.run(
        ["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["failed"]
        raise RunError(f"sbatch: {lines[-1].removeprefix('sbatch: error: ')}")
    return done.stdout.strip().partition(";")[0]

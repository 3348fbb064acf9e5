"""A run as one Slurm job: warned before its limit, requeued, its ranks' logs apart."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

from launchers.site import Site
from pretrain.errors import TRY_AGAIN, RunError, UsageError

_LOOP = """
run={run}
mkdir -p "$run/logs"
node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(getent hosts "$node" | awk '{{print $1; exit}}')
if [ -z "$address" ]; then
  address=$(scontrol --oneliner show node "$node" | tr ' ' '\\n' | sed -n 's/^NodeAddr=//p')
fi
export MASTER_ADDR="$address" MASTER_PORT=$((20000 + SLURM_JOB_ID * 7 % 20000))
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-${{SLURM_CPUS_PER_TASK:-1}}}}"

step() {{
  srun --wait=60 --kill-on-bad-exit=0 --open-mode=append "$@"
}}
newest() {{ cat "$run/checkpoints/latest" 2>/dev/null || echo none; }}
say() {{ echo "launch $(date +%FT%T): $*"; }}
{doctor}
# Ranks die by themselves (a signal: started again here) or ask for another start (exit code
# {again}: warned, hung, or a peer is gone; in a fresh allocation, perhaps without a bad node).
starts=0
while :; do
  # Another port each time: the one before may linger.
  export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + starts + 1) % 20000))
  say "start on $SLURM_JOB_NUM_NODES node(s) from $(newest), rendezvous $MASTER_ADDR:$MASTER_PORT"
  step --output="$run/logs/rank-%t.log" {words}
  code=$?
  [ "$code" -eq 0 ] && {{ say "complete"; exit 0; }}
  if [ "$code" -eq {again} ]; then break; fi
  starts=$((starts + 1))
  if [ "$code" -lt 128 ] || [ "$starts" -gt {restarts} ]; then
    say "ended with exit code $code; see $run/logs"
    exit "$code"
  fi
  say "a rank was killed (exit code $code); start $starts of {restarts} again"
done

# A job that gets no further from one allocation to the next is not requeued for ever.
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


def render(site: Site, words: list[str], run: Path, folder: Path) -> str:
    """The batch script of a run.

    Args:
        words: of `pretrain`, after its name.
        run: the run folder; logs of the ranks go to ``run/logs``.
        folder: where the job starts.
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
    head = [f"#SBATCH --{name}={value}" for name, value in options.items() if value]
    for line in head:
        if "\n" in line:
            raise UsageError(f"slurm.{line[10:].partition('=')[0]}: more than one line")
    exports = [f"export {name}={shlex.quote(value)}" for name, value in site.variables.items()]
    program = [site.interpreter(_in_image(site)), "-m", "pretrain", *words]
    srun = _srun_options(site)
    what = words[1 : words.index("--out") + 2]
    checked = [program[0], "-m", "pretrain", "doctor", *what]
    doctor = f"step {shlex.join([*srun, *_contained(site, checked)])} || exit\n"
    body = _LOOP.format(
        run=shlex.quote(str(run)),
        again=TRY_AGAIN,
        restarts=site.restarts,
        doctor=doctor if site.doctor else "",
        words=shlex.join([*srun, *_contained(site, program)]),
    )
    return "\n".join(
        ["#!/bin/bash", *head, "#SBATCH --requeue", "set -u", *site.setup, *exports, body]
    )


def _in_image(site: Site) -> bool:
    return site.container.kind != "none"


def _srun_options(site: Site) -> list[str]:
    # A step does not inherit this from its job.
    found = [f"--cpus-per-task={site.cpus_per_process}"] if site.cpus_per_process else []
    if site.container.kind == "pyxis":
        found.append(f"--container-image={site.container.image}")
        if site.container.mounts:
            found.append(f"--container-mounts={','.join(site.container.mounts)}")
    return found


def _contained(site: Site, program: list[str]) -> list[str]:
    if site.container.kind != "apptainer":
        return program
    binds = [word for mount in site.container.mounts for word in ("--bind", mount)]
    gpus = ["--nv"] if site.gpus_per_node else []
    return ["apptainer", "exec", *gpus, *binds, site.container.image, *program]


def submit(script: Path) -> str:
    """Hand a batch script to Slurm; returns the job's number.

    Raises:
        RunError: with what sbatch says.
    """
    if shutil.which("sbatch") is None:
        raise RunError(f"sbatch: not found here; submit it where it is: sbatch {script}")
    done = subprocess.run(
        ["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["failed"]
        raise RunError(f"sbatch: {lines[-1].removeprefix('sbatch: error: ')}")
    return done.stdout.strip().partition(";")[0]

"""`pretrain launch` and `pretrain doctor`. Part of the command line: nothing heavy at import."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from pretrain.cli.options import Code, Json, Overrides

_WARNED = 3
"""Exit code of a strict doctor that found only warnings; 2 is a wrong command line."""
Run = Annotated[Path | None, typer.Option("--out", help="Run folder; default runs/NAME-OF-RECIPE.")]


def launch(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe; see configs/.")],
    overrides: Overrides = None,
    on: Annotated[
        str,
        typer.Option("--on", help="local, slurm, hostfile, mpi, kubernetes or skypilot."),
    ] = "local",
    site: Annotated[
        Path | None, typer.Option(help="SITE.yaml: describes the cluster; see configs/sites.")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Number of nodes, instead of the site file's.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="GPUs per node, instead of the site file's.")
    ] = None,
    out: Run = None,
    fork: Annotated[
        str | None, typer.Option(help="Begin a new run from RUN@STEP, as `pretrain train` does.")
    ] = None,
    code: Code = None,
    show: Annotated[
        bool, typer.Option("--print", help="Print the job, manifest or command; start nothing.")
    ] = False,
) -> None:
    """Train a recipe on a cluster: as a Slurm job, on a list of hosts, or in the cloud.

    A small file describes the cluster, separately from recipes. A Slurm job is warned before its
    time limit, writes a checkpoint, is requeued and continues. If a process is killed, the job
    restarts from its last checkpoint. Each process has a log in RUN/logs; the generated files are
    in RUN/launch. For Kubernetes and SkyPilot, a file is written and the command that starts it is
    printed. If the site has GPUs, the command first says what the run will need on them: memory,
    hours, cost.
    """
    from launchers.launch import launch as start
    from pretrain.cluster.announce import say_what_it_needs

    raise typer.Exit(
        start(
            recipe, overrides or [], on, site, nodes, processes, out, fork, show, code or [],
            say_what_it_needs,
        )
    )  # fmt: skip


def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(help="YAML recipe: also checks its grid, data and checkpoints.")
    ] = None,
    overrides: Overrides = None,
    out: Run = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Number of processes to start on this machine.")
    ] = 1,
    code: Code = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit code 3 if there are warnings and no failures.")
    ] = False,
    json: Json = False,
) -> None:
    """Check the machines before a long run: versions, devices, links, clocks, disk, data, code.

    Start it like the job itself, with torchrun, srun, deepspeed or mpirun. It checks whether all
    processes have the same versions, code and data, how fast each group of the grid communicates,
    whether all processes see the run folder, and whether its file system has what a run needs.
    Each finding is ok, warn or fail. Exit code 1 if something would make the run fail, else 0; with
    --strict, 3 if there are only warnings.
    """
    if processes > 1 and "RANK" not in os.environ:
        from launchers.supervise import run_here

        raise typer.Exit(run_here(processes, sys.argv[1:]))
    from pretrain.config.recipe import Config, load_config
    from pretrain.distributed.grid import build_grid, check_grid, connect, disconnect, process_count

    config = load_config(recipe, overrides, code or []) if recipe else None
    shape = (config or Config()).grid
    check_grid(shape, process_count())
    grid = build_grid(shape, connect())
    from pretrain.cluster.doctor import as_json, examine

    run = out or Path("runs") / (recipe.stem if recipe else "")
    findings = examine(grid, config, run)
    failed = any(finding.state == "fail" for finding in findings)
    warned = any(finding.state == "warn" for finding in findings)
    if grid.is_main:
        if json:
            from data_pipeline.strict_json import to_json

            print(to_json(as_json(findings)))
        else:
            for finding in findings:
                print(f"{finding.state:5} {finding.check:14} {finding.text}")
            print("not fit for a run: see fail above" if failed else "fit for a run")
        sys.stdout.flush()
    disconnect()
    raise typer.Exit(1 if failed else _WARNED if strict and warned else 0)


def plan(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe; see configs/.")],
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="Number of GPUs.")] = 8,
    gpu: Annotated[
        str,
        typer.Option(
            help="a100, a100-40, h100, h200, b200, l40s, mi300x; here: measure this machine."
        ),
    ] = "h100",
    show: Annotated[int, typer.Option("--show", min=1, help="Number of grids in the table.")] = 8,
    code: Code = None,
    json: Json = False,
) -> None:
    """Rank all grids by time: memory by part, traffic, bubble, time and MFU of each.

    Nothing is run and no data is needed: the plan uses formulas of the recipe's shapes and the
    device's published rates. Grids that do not fit are listed last.
    """
    from pretrain.cli.console import warn
    from pretrain.cluster.plan_table import plan as print_plan
    from pretrain.cluster.vocabulary import with_vocabulary
    from pretrain.config.recipe import load_config
    from pretrain.decay.lengths import say_remarks

    config = load_config(recipe, overrides, code or [])
    say_remarks([config])
    config, assumed = with_vocabulary(config)
    if assumed:
        warn(assumed)
    print_plan(config, gpu, gpus, show, json)

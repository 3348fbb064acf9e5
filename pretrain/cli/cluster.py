"""`pretrain launch` and `pretrain doctor`. Part of the command line: nothing heavy at import."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from pretrain.cli.options import Json, Overrides

Run = Annotated[Path | None, typer.Option("--out", help="Run folder; default runs/NAME-OF-RECIPE.")]


def launch(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe; see configs/.")],
    overrides: Overrides = None,
    on: Annotated[
        str,
        typer.Option("--on", help="local, slurm, hostfile, mpi, kubernetes or skypilot."),
    ] = "local",
    site: Annotated[
        Path | None, typer.Option(help="SITE.yaml: what the cluster is like; see configs/sites.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Instead of the site file's.")] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="On each node, instead of the site file's.")
    ] = None,
    out: Run = None,
    fork: Annotated[
        str | None, typer.Option(help="Begin a new run from RUN@STEP, as `pretrain train` does.")
    ] = None,
    show: Annotated[
        bool, typer.Option("--print", help="Print the job, manifest or command; start nothing.")
    ] = False,
) -> None:
    """Train a recipe on a cluster: as a Slurm job, over hosts, or in the cloud.

    What the cluster is like stands in a small file, apart from recipes. A Slurm job is warned
    before its time limit, makes a checkpoint, is requeued and goes on; a job whose rank is killed
    starts again from its last checkpoint. Logs of each rank are in RUN/logs, what was rendered in
    RUN/launch. Kubernetes and SkyPilot get a file, and the command that starts it is said.
    """
    from launchers.launch import launch as start

    code = start(recipe, overrides or [], on, site, nodes, processes, out, fork, show)
    raise typer.Exit(code)


def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(help="YAML recipe: its grid, data and checkpoints, too.")
    ] = None,
    overrides: Overrides = None,
    out: Run = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Start so many processes on this machine.")
    ] = 1,
    json: Json = False,
) -> None:
    """Check the machines before a long run: versions, devices, links, clocks, disk, data, code.

    Under torchrun, srun, deepspeed or mpirun with the words of the job itself, every rank is
    asked: do all have the same versions, code and data, how fast is each group of the grid, do
    all see the run folder. Exit code 1 if something would make the run fail.
    """
    if processes > 1 and "RANK" not in os.environ:
        from launchers.supervise import run_here

        raise typer.Exit(run_here(processes, sys.argv[1:]))
    from pretrain.config.recipe import Config, load_config
    from pretrain.distributed.grid import build_grid, check_grid, connect, disconnect, process_count

    config = load_config(recipe, overrides) if recipe else None
    shape = (config or Config()).grid
    check_grid(shape, process_count())
    grid = build_grid(shape, connect())
    from pretrain.cluster.doctor import as_json, examine

    run = out or Path("runs") / (recipe.stem if recipe else "")
    findings = examine(grid, config, run)
    failed = any(one.state == "fail" for one in findings)
    if grid.is_main:
        if json:
            from data_pipeline.strict_json import to_json

            print(to_json(as_json(findings)))
        else:
            for one in findings:
                print(f"{one.state:5} {one.check:14} {one.text}")
            print("not fit for a run: see fail above" if failed else "fit for a run")
        sys.stdout.flush()
    disconnect()
    raise typer.Exit(1 if failed else 0)


def plan(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe; see configs/.")],
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="How many.")] = 8,
    gpu: Annotated[
        str, typer.Option(help="a100, a100-40, h100, h200, b200, l40s, mi300x; here: measured.")
    ] = "h100",
    show: Annotated[int, typer.Option("--show", min=1, help="Grids in the table.")] = 8,
    json: Json = False,
) -> None:
    """Which grid to ask for: memory by part, traffic, bubble, time and MFU of every grid, ranked.

    Nothing is run and no data is needed: formulas of the recipe's shapes and the device's published
    rates. Grids that do not fit stand at the end.
    """
    from pretrain.cluster.plan_table import plan as print_plan
    from pretrain.config.recipe import load_config

    print_plan(load_config(recipe, overrides), gpu, gpus, show, json)

"""The command line. Nothing heavy is imported until a command needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from pretrain.cli.cluster import doctor, launch, plan
from pretrain.cli.console import plain
from pretrain.cli.data import data_app
from pretrain.cli.exits import leave, report_broken_pipe, report_failure, report_stop
from pretrain.cli.models import evaluate, export, import_, print_evaluation, ranks
from pretrain.cli.options import Code, Json, Overrides
from pretrain.cli.paper import paper_app
from pretrain.cli.program import Version, application
from pretrain.cli.streams import flush_results, set_up_streams
from pretrain.cli.watch import watch
from pretrain.distributed.signals import SIGNALS
from pretrain.errors import ENDS

app = application(
    "Pretrain transformers, give attention its own weight decay, and measure the rank of attention "
    "during training.",
    whole=True,
)
app.add_typer(data_app, name="data")
app.add_typer(paper_app, name="paper")


@app.callback()
def accept_local_rank(
    local_rank: Annotated[
        int | None,
        typer.Option("--local_rank", "--local-rank", hidden=True, envvar="LOCAL_RANK"),
    ] = None,
    version: Version = False,
) -> None:
    """Drop `--local_rank`, which deepspeed's launcher puts first; its environment has it too."""


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe; see configs/.")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default runs/NAME-OF-RECIPE.")
    ] = None,
    fork: Annotated[
        str | None,
        typer.Option(
            help="Begin a new run from RUN@STEP: its weights, state and place in the data."
        ),
    ] = None,
    until: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after this step, with a checkpoint to fork from."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print parameter groups, grid and memory; train nothing."),
    ] = False,
    processes: Annotated[
        int, typer.Option(min=1, help="Number of processes to start on this machine.")
    ] = 1,
    restarts: Annotated[
        int,
        typer.Option(
            min=0,
            help="Restart when a process dies, hangs or loses its peers, up to N times without a "
            "new checkpoint: all processes here, or each one by itself under another launcher.",
        ),
    ] = 0,
    code: Code = None,
    json: Json = False,
) -> None:
    """Train a recipe, or continue its run where it stopped.

    If a run is interrupted, rerun the same command: it continues as if nothing had happened. By
    default one process trains. Use --processes for several, or start the same command with
    torchrun, deepspeed, mpirun or srun. Data parallelism uses the processes that the grid leaves
    over.

    \b
    pretrain train configs/gpt-tiny.yaml --dry-run
    pretrain train configs/gpt-tiny.yaml train.steps=100 --out runs/short
    pretrain train configs/gpt-tiny.yaml --processes 2 grid.tensor_parallel=2
    pretrain train configs/gpt-tiny.yaml --fork runs/short@100 --out runs/fork
    """
    if (processes > 1 or restarts) and not dry_run:
        _start_again(processes, out or Path("runs") / recipe.stem, restarts)
    from pretrain.config.recipe import load_config

    config = load_config(recipe, overrides, code or [])
    if dry_run:
        from pretrain.cluster.dry_run import dry_run as describe

        describe(config, as_json=json, processes=processes)
        return
    from pretrain.distributed.grid import build_grid, check_grid, connect, disconnect, process_count

    check_grid(config.grid, process_count())
    from pretrain.engine.libraries import load_libraries
    from pretrain.engine.speed import keep_freed_memory
    from pretrain.runs.folder import resolve_checkpoint
    from pretrain.training.start import train as run_training

    source = resolve_checkpoint(fork) if fork else None
    grid = build_grid(config.grid, connect())
    keep_freed_memory(grid.device)
    load_libraries()
    run = out or Path("runs") / recipe.stem
    run_training(config, run, grid, source, until)
    if grid.is_main:
        if until is not None and until < config.train.steps:
            _print_stop(run, until, config.train.steps, json)
        else:
            _print_result(run, json)
    disconnect()


def _start_again(processes: int, run: Path, restarts: int) -> None:
    """Start processes here, or a supervisor if a launcher started this process."""
    from launchers.supervise import is_supervised, run_here, supervise

    if "RANK" not in os.environ:
        raise typer.Exit(run_here(processes, sys.argv[1:], run, restarts))

    # Under torchrun, which counts its own restarts, there is nothing to do.
    if restarts and "TORCHELASTIC_RUN_ID" not in os.environ and not is_supervised():
        raise typer.Exit(supervise(sys.argv[1:], run, restarts))


def _print_stop(run: Path, step: int, steps: int, as_json: bool) -> None:
    from data_pipeline.strict_json import to_json

    if as_json:
        print(to_json({"run": str(run), "step": step, "steps": steps}))
    else:
        print(f"trained to step {step} of {steps} (--until): {plain(str(run))}")


def _print_result(run: Path, as_json: bool) -> None:
    from data_pipeline.strict_json import to_json
    from pretrain.runs.folder import read_evaluation

    path = run / "evaluation.json"
    if not path.exists():
        print(f"done: {plain(str(run))}")
        return
    figures = read_evaluation(path)
    if as_json:
        print(to_json({"run": str(run), **figures}))
        return
    print_evaluation(figures)
    print(f"done: {plain(str(run))}")


app.command()(evaluate)
app.command()(export)
app.command("import")(import_)
app.command()(ranks)


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="SWEEP.yaml; see docs/sweeps.md.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the runs; default runs/NAME-OF-SWEEP.")
    ] = None,
    launcher: Annotated[str, typer.Option(help="local or slurm.")] = "local",
    parallel: Annotated[
        int,
        typer.Option(min=0, help="Runs at once on this machine; 0: one, or one per GPU."),
    ] = 0,
    retries: Annotated[
        int | None, typer.Option(min=0, help="How often a failed run is tried again.")
    ] = None,
    slurm: Annotated[
        list[str] | None,
        typer.Option("--slurm", help="KEY=VALUE for submitit, such as partition=gpu, time=240."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print runs, tokens, time and cost; run nothing.")
    ] = False,
    timing: Annotated[
        bool, typer.Option(help="With --dry-run: time a few steps of one run.")
    ] = True,
    price: Annotated[float, typer.Option(min=0, help="Price of one process for one hour.")] = 0.0,
    json: Json = False,
) -> None:
    """Run a grid of decays over seeds, or continue it where it stopped.

    Finished runs are kept, interrupted runs continue, and failed runs are tried again. If you add a
    point to the file later, only that point runs. Runs of one seed share their initial weights and
    the order of their data, so that `pretrain report FOLDER` can compare them in pairs.

    A run's folder is named after its values in the file: attention=3,seed=1. For a key under
    exposure this is the exposure; --dry-run and the report show λ.

    \b
    pretrain sweep configs/studies/attention-decay.yaml --dry-run
    pretrain sweep configs/studies/attention-decay.yaml --parallel 2
    """
    from launchers.sweeps import run

    code = run(
        file, out, launcher, parallel, retries, slurm or [], dry_run, timing, price, as_json=json
    )
    raise typer.Exit(code)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or a sweep's folder.")],
    out: Annotated[
        Path | None, typer.Option(help="File (csv, png, pdf: folder); default report.FORMAT.")
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="html, md, latex, csv, png or pdf.")
    ] = "html",
    baseline: Annotated[
        str | None,
        typer.Option(help='Condition to compare the others with, such as "attention = 0.1".'),
    ] = None,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Include runs that are not finished.")
    ] = False,
    band: Annotated[
        str,
        typer.Option(help="What the bands of figures span at first and in print: heads, seeds."),
    ] = "heads",
    follow: Annotated[
        bool,
        typer.Option("--follow", help="Write the page again while the runs train, until they end."),
    ] = False,
    every: Annotated[
        float, typer.Option(min=1, help="With --follow: seconds between two pages.")
    ] = 60.0,
) -> None:
    """Make tables and figures from run folders: means, paired differences, rank, balance.

    The page (html) needs no network. It has tables of means and of paired differences with
    intervals, figures with menus and sliders, and the data of each as CSV. Runs that differ only
    in the seed are replicates of one condition. With --follow, the page shows runs while they
    train, and a browser in which it is open loads each new version.
    """
    from pretrain.report import print_summary, write_report

    endings = {"latex": "tex", "csv": "", "png": "", "pdf": ""}
    ending = endings.get(form, form)
    path = out or Path(f"report.{ending}" if ending else "report")
    if follow:
        from pretrain.report.follow import follow_runs

        study = follow_runs(runs, path, form, baseline, band, every)
    else:
        study = write_report(runs, path, form, baseline, unfinished, band)
    print_summary(study)
    print(f"report: {plain(str(path))}")


app.command()(watch)
app.command()(launch)
app.command()(doctor)
app.command()(plan)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything.")] = Path("demo"),
    steps: Annotated[int, typer.Option(min=10, help="Updates per run.")] = 300,
) -> None:
    """Run the whole pipeline in minutes, on text that this machine already has.

    It makes a corpus, a tokenizer and tokens, trains the same small model with several decays of
    its attention and everything else equal, evaluates the models, and writes one page of plots.
    """
    from pretrain.cli.demo import run_demo

    run_demo(out, steps)


def run_command(command: Callable[..., object] = app) -> int:
    """Run the command in ``sys.argv``, and report errors on standard error.

    Args:
        command: the program, called as Click calls one.

    Returns:
        The exit code: 2 for usage errors, 1 for trouble, 75 for "try again", 130 for Ctrl-C.
    """
    try:
        SIGNALS.listen()  # first: until then, a signal ends the process
        set_up_streams(sys.argv[1:])
        # Typer returns the exit code of `--help` and `typer.Exit` here instead of exiting.
        code = command(standalone_mode=False)
        code = code if isinstance(code, int) else 0
        if code == 0:
            flush_results()
        return code
    except SystemExit as end:
        return report_broken_pipe(end)
    except typer.Abort as abort:
        if isinstance(abort.__cause__, EOFError):  # of a file; nothing here asks on a terminal
            return report_failure(abort.__cause__)
        return report_stop(abort)
    except ENDS as end:
        return report_stop(end)
    except Exception as error:
        if SIGNALS.raised:
            return report_stop(error)
        return report_failure(error)


def main() -> None:
    """The program: run a command and end the process with its exit code."""
    leave(run_command())


if __name__ == "__main__":
    main()

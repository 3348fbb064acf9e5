"""`pretrain paper …`: one command per figure, which runs the figure's sweep. Nothing heavy is
imported until a figure needs it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from pretrain.cli.program import application

paper_app = application(
    'The experiments of "Weight decay induces low-rank attention layers", one command per '
    "figure. Each prints its checks; if one fails, the exit code is 1. Figures of trained models "
    "run a sweep of configs/paper at a size for two cores, or read your runs with --from. If a "
    "sweep is interrupted, rerun the command to continue."
)

Out = Annotated[Path, typer.Option(help="Folder for the figure and its numbers.")]
Runs = Annotated[Path, typer.Option(help="Folder of the runs.")]
From = Annotated[
    Path | None,
    typer.Option("--from", help="Use existing runs, such as a sweep at full scale."),
]
Parallel = Annotated[
    int, typer.Option(min=0, help="Runs at once; 0: one per core up to two, or one per GPU.")
]
Data = Annotated[
    Path | None, typer.Option(help="Tokenised text; default: this Python installation's.")
]
Model = Annotated[
    str | None,
    typer.Option(help="A pretrained model: folder, or name on the Hub; default: our own runs."),
]
_PAUSE = 1.0
"""Seconds until a figure that another process writes is tried again."""
_EXPOSURES = {"fig4": 8.0, "fig6": 3.0}
"""Exposure of the runs that are shown. LLaMA-2-7B has about 8 (λ = 0.1, a rate from 3e-4 to 3e-5
over 480,000 updates); 3 is that of the paper's own λ = 0.1."""
_PAPER, _RUNS = Path("paper"), Path("runs/paper")


def _alone(command: Callable[..., None]) -> Callable[..., None]:
    """The command of a figure as the only process that writes this figure in this folder."""
    name = command.__name__.replace("_", "-")

    @wraps(command)
    def run(out: Path = _PAPER, **options: Any) -> None:
        from data_pipeline.files import held

        _refuse_same(out, options.get("runs"))
        with held(out / name):
            command(out=out, **options)

    return run


def _refuse_same(out: Path, runs: Path | None) -> None:
    """Refuse figures among the runs: a figure and its runs have the same name.

    Raises:
        UsageError: if both are one folder.
    """
    from pretrain.errors import UsageError

    if runs is not None and out.resolve() == runs.resolve():
        raise UsageError(f"--out and --runs: both are {out}; choose two folders")


def _at_once(parallel: int) -> int:
    import torch

    from pretrain.distributed.cores import usable_cores

    if parallel or torch.cuda.is_available():
        return parallel
    return max(1, min(2, usable_cores()))


def _runs(name: str, runs: Path, existing: Path | None, parallel: int, data: Path | None) -> Path:
    if existing is not None:
        return existing
    from launchers.paper import experiment

    return experiment(name, runs, _at_once(parallel), data)


@paper_app.command()
@_alone
def fig1(out: Out = _PAPER) -> None:
    """Two factors by gradient descent: gap, discrepancy, singular values against decay."""
    from pretrain.report.paper.fig1 import run

    run(out)


@paper_app.command()
@_alone
def fig2(
    out: Out = _PAPER, runs: Runs = _RUNS, existing: From = None, parallel: Parallel = 0
) -> None:
    """Associative recall: rank, discrepancy and gap of an attention-only model over training."""
    from pretrain.report.paper.fig2 import figure

    figure(_runs("fig2", runs, existing, parallel, None), out)


@paper_app.command()
@_alone
def fig3(
    out: Out = _PAPER, runs: Runs = _RUNS, existing: From = None, parallel: Parallel = 0,
    data: Data = None,
) -> None:  # fmt: skip
    """Language model: rank in the paper's layer 5 (at its depth) against attention decay.

    At the paper's scale: configs/paper/fig3-125m.yaml, then --from its runs.
    """
    from pretrain.report.paper.fig3 import figure

    figure("fig3", _runs("fig3", runs, existing, parallel, data), out)


@paper_app.command()
@_alone
def fig7(
    out: Out = _PAPER, runs: Runs = _RUNS, existing: From = None, parallel: Parallel = 0,
    data: Data = None,
) -> None:  # fmt: skip
    """The same for the layers at the depth of layers 7 and 9."""
    from pretrain.report.paper.fig3 import figure

    figure("fig7", _runs("fig3", runs, existing, parallel, data), out)


@paper_app.command()
@_alone
def table1(
    out: Out = _PAPER, runs: Runs = _RUNS, existing: From = None, parallel: Parallel = 0,
    data: Data = None,
) -> None:  # fmt: skip
    """Perplexity on held-out text by attention decay and MLP decay, over seeds."""
    from pretrain.report.paper.fig3 import table

    table(_runs("fig3", runs, existing, parallel, data), out)


@paper_app.command("fig3-vit")
@_alone
def fig3_vit(
    out: Out = _PAPER, runs: Runs = _RUNS, existing: From = None, parallel: Parallel = 0
) -> None:
    """Vision Transformer: rank over all heads and layers, and accuracy, against decay.

    On scikit-learn's digits; on ImageNet: configs/paper/fig3-vit-imagenet.yaml, then --from.
    """
    from pretrain.report.paper.fig3_vit import figure

    figure(_runs("fig3-vit", runs, existing, parallel, None), out)


@paper_app.command()
@_alone
def fig4(
    out: Out = _PAPER, runs: Runs = _RUNS, existing: From = None, model: Model = None,
    family: Path | None = None, parallel: Parallel = 0,
) -> None:  # fmt: skip
    """Balance of a trained language model's factors (paper: LLaMA-2-7B; --model FOLDER)."""
    _scatter("fig4", "fig3", out, runs, existing, model, family, parallel)


@paper_app.command()
@_alone
def fig6(
    out: Out = _PAPER, runs: Runs = _RUNS, existing: From = None, model: Model = None,
    family: Path | None = None, parallel: Parallel = 0,
) -> None:  # fmt: skip
    """Balance of a trained Vision Transformer's factors (paper: ViT-B/16; --model FOLDER)."""
    _scatter("fig6", "fig3-vit", out, runs, existing, model, family, parallel)


def _scatter(
    name: str, sweep: str, out: Path, runs: Path, existing: Path | None, model: str | None,
    family: Path | None, parallel: int,
) -> None:  # fmt: skip
    from pretrain.errors import UsageError
    from pretrain.report.paper.fig4 import figure, nearest_exposure, without_decay
    from pretrain.report.paper.runs import load_runs

    if model is not None and existing is not None:
        raise UsageError("--model and --from: give one of them")
    if model is not None:
        figure(name, [model], out, family)
        return
    sweep_runs = load_runs(_runs(sweep, runs, existing, parallel, None))
    chosen = [str(run.path) for run in nearest_exposure(sweep_runs, _EXPOSURES[name])]
    figure(name, chosen, out, contrast=[str(run.path) for run in without_decay(sweep_runs)])


@paper_app.command()
@_alone
def fig5(out: Out = _PAPER) -> None:
    """AdamW's decay against Adam with L2, for two scalars, direct and factored."""
    from pretrain.report.paper.fig5 import run

    run(out)


@paper_app.command()
@_alone
def modern(
    out: Out = _PAPER, runs: Runs = _RUNS, existing: From = None, parallel: Parallel = 0,
    data: Data = None,
) -> None:  # fmt: skip
    """Beyond the paper: grouped queries, rotary, QK-norm, biases, linear and sigmoid, Muon."""
    from pretrain.report.paper.modern import figure

    figure(_runs("modern", runs, existing, parallel, data), out)


@paper_app.command("rank-cost")
@_alone
def rank_cost(
    out: Out = _PAPER, runs: Runs = _RUNS, existing: From = None, parallel: Parallel = 0,
    data: Data = None,
) -> None:  # fmt: skip
    """Beyond the paper: perplexity when attention is cut to a share of its rank."""
    from pretrain.report.paper.rank_cost import figure

    text = _runs("fig3", runs, existing, parallel, data)
    recall = None if existing else _runs("fig2", runs, None, parallel, None)
    figure(text, out, data, recall)


_ALL: dict[str, Callable[..., None]] = {
    "fig1": fig1, "fig2": fig2, "fig3": fig3, "fig7": fig7, "table1": table1,
    "fig3-vit": fig3_vit, "fig4": fig4, "fig6": fig6, "fig5": fig5, "modern": modern,
    "rank-cost": rank_cost,
}  # fmt: skip


@paper_app.command("all")
def everything(
    out: Out = _PAPER,
    runs: Runs = _RUNS,
    parallel: Parallel = 0,
    page: Annotated[
        Path | None, typer.Option(help="The page that shows them all; default: OUT/paper.md.")
    ] = None,
) -> None:
    """Make every figure at a small scale, and one page with claims, figures and measured numbers.

    It takes about half an hour on two cores. If it is interrupted, rerun it to continue.
    """
    from data_pipeline.files import held

    _refuse_same(out, runs)
    path = page or out / "paper.md"
    with held(path):
        _everything(out, runs, parallel, path)


def _when_free(make: Callable[[], None]) -> None:
    """Make a figure, after another process that writes it, or its runs, has ended."""
    from data_pipeline.files import HeldError
    from pretrain.runs.lock import BusyError

    waiting = False
    while True:
        try:
            make()
            return
        except (HeldError, BusyError) as error:
            if not waiting:
                print(f"{str(error).partition(';')[0]}: waiting for it", flush=True)
            waiting = True
            time.sleep(_PAUSE)


def _everything(out: Path, runs: Path, parallel: int, path: Path) -> None:
    from pretrain.distributed.grid import disconnect
    from pretrain.errors import RunError
    from pretrain.report.paper.page import write_page

    began = time.monotonic()
    failures = []
    for name, command in _ALL.items():
        print(f"--- {name}", flush=True)
        trained = {} if name in ("fig1", "fig5") else {"runs": runs, "parallel": parallel}
        try:
            _when_free(partial(command, out=out, **trained))
        except RunError as error:
            failures.append(str(error))
    disconnect()
    write_page(path, out, list(_ALL))
    print(f"page: {path}  ({(time.monotonic() - began) / 60:.1f} min)")
    if failures:
        raise RunError("; ".join(failures))

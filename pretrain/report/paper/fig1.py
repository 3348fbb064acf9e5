"""Figure 1: two factors by gradient descent, and a single matrix for contrast.

The loss is L(A, B) = ‖ABᵀ − D‖² + λ/2 (‖A‖² + ‖B‖²), D = diag(0.2, …, 1). With this convention
(no ½ before the first norm) a singular value s of D becomes max(s − λ/2, 0); with ½ it would be
max(s − λ, 0), which is how the paper's plot is labelled. A single matrix W under
‖W − D‖² + λ/2 ‖W‖² becomes D/(1 + λ/2): every singular value shrinks and none vanishes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.report.paper.checks import Check, conclude
from pretrain.runs.outputs import write_csv, write_figure
from pretrain.spectra import product_statistics

LEVELS = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2], dtype=torch.float64)
SHOWN = (0.0, 0.1, 0.2, 0.4, 0.8)
CHECKED = (0.1, 0.3, 0.5, 0.7, 0.9)
"""λ values whose halves lie between two levels; at a level itself, convergence is not
exponential."""


@dataclass(frozen=True)
class Trajectory:
    """Statistics over the steps, for each λ."""

    steps: list[int]
    gap: Tensor
    """``[steps, λ]``"""
    discrepancy: Tensor
    """``[steps, λ]``"""
    singular_values: Tensor
    """``[steps, λ, 5]``"""


def start(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The same random factors for every λ, ``[count, 5, 5]`` each."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (0.5 * torch.randn(5, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return a.expand(count, 5, 5).clone(), b.expand(count, 5, 5).clone()


def descend(decays: tuple[float, ...], rate: float, steps: int, every: int) -> Trajectory:
    """Gradient descent for all λ at once, measured every ``every`` steps."""
    a, b = start(len(decays))
    target = torch.diag(LEVELS)
    decay = torch.tensor(decays, dtype=torch.float64)[:, None, None]
    statistics, times = [], []
    for step in range(steps + 1):
        if step % every == 0:
            times.append(step)
            statistics.append(product_statistics(a, b))
        residual = 2 * (a @ b.mT - target)
        a, b = a - rate * (residual @ b + decay * a), b - rate * (residual.mT @ a + decay * b)
    return Trajectory(
        times,
        torch.stack([sample.gap for sample in statistics]),
        torch.stack([sample.discrepancy for sample in statistics]),
        torch.stack([sample.singular_values for sample in statistics]),
    )


def descend_single(decays: tuple[float, ...], rate: float, steps: int) -> Tensor:
    """Singular values ``[λ, 5]`` of a single matrix after gradient descent."""
    w = start(len(decays))[0]
    decay = torch.tensor(decays, dtype=torch.float64)[:, None, None]
    for _ in range(steps):
        w = w - rate * (2 * (w - torch.diag(LEVELS)) + decay * w)
    values: Tensor = torch.linalg.svdvals(w)
    return values


def checks() -> list[Check]:
    """Every quantitative prediction of the figure."""
    long = descend(CHECKED, rate=0.05, steps=12_000, every=12_000)
    expected = (LEVELS - torch.tensor(CHECKED, dtype=torch.float64)[:, None] / 2).clamp_min(0)
    closed_form = (long.singular_values[-1] - expected).abs().max()
    # A small rate, because the law of the discrepancy is for gradient flow: the error per step is
    # η².
    rate, steps = 2e-4, 20_000
    fine = descend((0.0, *CHECKED), rate, steps, every=1000)
    fall = (fine.discrepancy[-1] / fine.discrepancy[0])[1:].log()
    predicted = -2 * rate * torch.tensor(CHECKED, dtype=torch.float64) * steps
    still = (fine.discrepancy[:, 0] / fine.discrepancy[0, 0] - 1).abs().max()
    single = descend_single(CHECKED, 0.05, 2000)
    shrunk = LEVELS / (1 + torch.tensor(CHECKED, dtype=torch.float64)[:, None] / 2)
    return [
        Check("singular values end at max(s − λ/2, 0)", closed_form.item(), 1e-6),
        Check("the gap closes for λ > 0", long.gap[-1].max().item(), 1e-6),
        Check(
            "‖AᵀA − BᵀB‖ falls at rate 2ηλ per step",
            (fall / predicted - 1).abs().max().item(),
            0.02,
        ),
        Check("without decay ‖AᵀA − BᵀB‖ does not change", still.item(), 1e-3),
        Check("a single matrix ends at s/(1 + λ/2)", (single - shrunk).abs().max().item(), 1e-6),
        Check("and the single matrix's rank never falls", float((single < 1e-3).sum()), 0.0),
    ]


def run(out: Path) -> None:
    """Draw the four panels, write their numbers, print the checks."""
    out.mkdir(parents=True, exist_ok=True)
    shown = descend(SHOWN, rate=0.02, steps=1000, every=5)
    fine = tuple(round(0.05 * index, 2) for index in range(45))
    ends = descend(fine, rate=0.02, steps=1000, every=1000)
    write_csv(out / "fig1.csv", _rows(shown))
    _draw(shown, fine, ends, out / "fig1.png")
    conclude("fig1", checks(), out)


def _rows(shown: Trajectory) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "decay": decay,
            "gap": shown.gap[i, j].item(),
            "discrepancy": shown.discrepancy[i, j].item(),
            **{f"sigma_{k + 1}": shown.singular_values[i, j, k].item() for k in range(5)},
        }
        for i, step in enumerate(shown.steps)
        for j, decay in enumerate(SHOWN)
    ]


def _draw(shown: Trajectory, fine: tuple[float, ...], ends: Trajectory, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colour = matplotlib.colormaps["viridis"]
    figure, (gap, discrepancy, against, over) = plt.subplots(
        1, 4, figsize=(15, 3.4), layout="constrained"
    )
    for index, decay in enumerate(SHOWN):
        style = {"color": colour(0.9 * index / (len(SHOWN) - 1)), "label": f"λ = {decay:g}"}
        gap.semilogy(shown.steps, shown.gap[:, index], **style)
        discrepancy.semilogy(shown.steps, shown.discrepancy[:, index], **style)
    gap.set(title="½(‖A‖² + ‖B‖²) − ‖ABᵀ‖$_*$", xlabel="step", ylim=(1e-12, None))
    gap.legend(fontsize=8, frameon=False)
    discrepancy.set(title="‖AᵀA − BᵀB‖", xlabel="step")
    decays = torch.tensor(fine, dtype=torch.float64)
    for index, level in enumerate(LEVELS):
        against.plot(fine, ends.singular_values[-1, :, index], color="black")
        against.plot(fine, (level - decays / 2).clamp_min(0), ":", color="tab:orange")
    against.set(title="singular values at step 1000", xlabel="λ (dotted: max(s − λ/2, 0))")
    over.plot(shown.steps, shown.singular_values[:, SHOWN.index(0.4)], color="black")
    over.set(title="singular values, λ = 0.4", xlabel="step")
    write_figure(path, figure)
    plt.close(figure)

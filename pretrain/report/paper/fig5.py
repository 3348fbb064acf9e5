"""Figure 5: the penalty to which AdamW's decay is equivalent, for two scalars.

The loss is the squared distance of w = (w₁, w₂) to the line S: 2w₁ + w₂ = 2. AdamW with decay λ
converges to the point where the gradient balances an L2 penalty of strength λ_L2 = λε/(1 − λ|w|)
(elementwise; λε only while λ|w| ≪ 1): the point of S with the least L2 norm. With w = a·b, decay of
a and b acts as an L1 penalty, and the end point is the point of S with the least L1 norm.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.report.paper.checks import Check, conclude
from pretrain.runs.outputs import write_csv, write_figure

L2_POINT, L1_POINT = (0.8, 0.4), (1.0, 0.0)
START = (0.3, 1.4)
DECAY, EPSILON = 0.05, 1e-2
"""A large ε, so that the penalty λε is above the optimizer's rounding."""
RATE, STEPS, EVERY = 2e-2, 20_000, 50


def distance(w: Tensor) -> Tensor:
    """Squared distance of w to S."""
    return (2 * w[0] + w[1] - 2).square() / 5


def direct(parameters: Tensor) -> Tensor:
    """w itself."""
    return parameters


def factored(parameters: Tensor) -> Tensor:
    """w = a·b."""
    return parameters[:2] * parameters[2:]


End = tuple[list[Any], Tensor, Tensor]
"""Points ``(step, w₁, w₂)``, the final parameters, their gradient without any penalty."""
FORMS: dict[str, Callable[[Tensor], Tensor]] = {"direct": direct, "factored": factored}
OPTIMIZERS = {"AdamW": True, "Adam + L2": False}


def train(decoupled: bool) -> dict[str, End]:
    """The path of w in each form under AdamW with decay λ, or Adam with L2 penalty λε.

    Both forms are parameters of one optimizer: it treats every element alone.
    """
    w = torch.tensor(START, dtype=torch.float64)
    firsts = {"direct": w, "factored": torch.cat([w.sqrt(), w.sqrt()])}
    parameters = {form: first.clone().requires_grad_() for form, first in firsts.items()}
    settings: dict[str, Any] = {"lr": RATE, "betas": (0.9, 0.95), "eps": EPSILON, "foreach": False}
    optimizer: torch.optim.Optimizer
    if decoupled:
        optimizer = torch.optim.AdamW(parameters.values(), weight_decay=DECAY, **settings)
    else:
        optimizer = torch.optim.Adam(parameters.values(), weight_decay=DECAY * EPSILON, **settings)
    paths: dict[str, list[Any]] = {form: [] for form in FORMS}
    for step in range(STEPS + 1):
        points = {form: FORMS[form](values) for form, values in parameters.items()}
        if step % EVERY == 0:
            for form, point in points.items():
                paths[form].append((step, *point.tolist()))
        optimizer.zero_grad()
        sum(map(distance, points.values()), torch.zeros(())).backward()
        if step < STEPS:
            optimizer.step()
    return {form: (paths[form], p.detach(), _gradient(p)) for form, p in parameters.items()}


def _gradient(parameters: Tensor) -> Tensor:
    assert parameters.grad is not None
    return parameters.grad


def run(out: Path) -> None:
    """Draw both panels, write the paths, print the checks."""
    out.mkdir(parents=True, exist_ok=True)
    trained = {name: train(decoupled) for name, decoupled in OPTIMIZERS.items()}
    results = {(form, name): trained[name][form] for form in FORMS for name in OPTIMIZERS}
    write_csv(
        out / "fig5.csv",
        [
            {"form": form, "optimizer": optimizer, "step": step, "w1": x, "w2": y}
            for (form, optimizer), (path, *_) in results.items()
            for step, x, y in path
        ],
    )
    _draw({arm: path for arm, (path, *_) in results.items()}, out / "fig5.png")
    conclude("fig5", checks(results), out)


def checks(trained: dict[tuple[str, str], tuple[list[Any], Tensor, Tensor]]) -> list[Check]:
    """Check the end points, and compare AdamW's exact fixed point with the approximate one."""
    results = []
    for (form, optimizer), (path, *_) in trained.items():
        name, point = ("L2", L2_POINT) if form == "direct" else ("L1", L1_POINT)
        miss = max(abs(a - b) for a, b in zip(path[-1][1:], point, strict=True))
        results.append(Check(f"{form}, {optimizer}: ends at the {name} point of S", miss, 0.03))
    _, w, gradient = trained["direct", "AdamW"]
    exact = DECAY * EPSILON / (1 - DECAY * w.abs())
    measured = -gradient / w
    error = (measured / exact - 1).abs().max().item()
    results.append(Check("AdamW converges to the point where λ_L2 = λε/(1 − λ|w|)", error, 1e-4))
    naive = (measured / (DECAY * EPSILON) - 1).abs().max().item()
    print(f"note   the paper's λ_L2 = λε is approximate here: off by {naive:.3g} (λ|w| = "
          f"{(DECAY * w.abs()).max():.3g})")  # fmt: skip
    return results


def _draw(paths: dict[tuple[str, str], list[Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
    for axes, form in zip(panels, ("direct", "factored"), strict=True):
        axes.plot([0.2, 1.1], [1.6, -0.2], color="lightgrey", linewidth=4, label="S")
        for optimizer, style in (("AdamW", "-"), ("Adam + L2", "--")):
            points = paths[form, optimizer]
            axes.plot([p[1] for p in points], [p[2] for p in points], style, label=optimizer)
        axes.plot(*L2_POINT, "ko", label="least L2")
        axes.plot(*L1_POINT, "k^", label="least L1")
        axes.set(title="w" if form == "direct" else "w = a · b", xlabel="w₁")
    panels[0].set_ylabel("w₂")
    panels[0].legend(frameon=False)
    write_figure(path, figure)
    plt.close(figure)

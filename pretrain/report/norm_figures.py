"""The figure of norms of weights, gradients and updates, and of the largest attention logit."""

from __future__ import annotations

from collections.abc import Callable

from models.roles import Role
from pretrain.report.figure_parts import about, shade
from pretrain.report.load import RunData, Study
from pretrain.report.spec import Choice, Control, Figure, Panel
from pretrain.report.training_figures import Line, averaged, line_over
from pretrain.runs.norm_lines import LARGEST_LOGIT, NORMS

_LOGIT = "largest attention logit"
_SHOWN = [role for role in Role if role not in (Role.NORM, Role.BIAS, Role.POSITION)]
"""Roles that have a panel, in this order."""


def norms_if_any(study: Study) -> list[Figure]:
    """Norms by role during training, for runs that logged them (``logging.norms``)."""
    known = {name for run in study.runs for row in run.norms for name in row}
    options = [kind for kind in NORMS if any(name.startswith(f"{kind}/") for name in known)]
    options += [_LOGIT] if LARGEST_LOGIT in known else []
    if not options:
        return []

    def view(choice: Choice) -> list[Panel]:
        option = options[choice[0]]
        if option == _LOGIT:
            return [_panel(study, LARGEST_LOGIT, "all layers", _LOGIT)]
        return [
            _panel(study, f"{option}/{role}", role.replace("_", " "), f"norm of {option}")
            for role in _SHOWN
            if f"{option}/{role}" in known
        ]

    return [
        Figure(
            "norms",
            "Norms by role",
            "Euclidean norms of all parameters of a role over all layers: of the weights after an "
            "update, of the gradients as the optimizer used them, and of the change by the update, "
            "decay included. The largest attention logit q·k/√head is that of the update's first "
            f"micro batch. Means over seeds; a line in every {_interval(study)}. {about(study)}",
            [Control("quantity", options)],
            view,
        )
    ]


def _interval(study: Study) -> str:
    intervals = sorted({run.config.norms_every for run in study.runs if run.norms})
    return f"{' or '.join(map(str, intervals))} updates"


def _panel(study: Study, name: str, title: str, unit: str) -> Panel:
    lines = []
    for index, condition in enumerate(study.conditions):
        steps, values = averaged(condition, _line_of(name))
        if steps:
            colour = shade(index, len(study.conditions))
            lines.append(line_over(condition.name, steps, values, colour))
    return Panel(title, "step", unit, lines, log_y=unit != _LOGIT)


def _line_of(name: str) -> Callable[[RunData], Line]:
    def line_of(run: RunData) -> Line:
        rows = [row for row in run.norms if name in row]
        return [int(row["step"]) for row in rows], [row[name] for row in rows]

    return line_of

"""A planned grid in words: for a command line, a recipe's comment, and before a job is submitted.

``python -m pretrain.cluster.plan_words configs/*.yaml`` writes the comments again that have a plan.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from pretrain.cluster.plan import Choice, rank
from pretrain.cluster.vocabulary import with_vocabulary
from pretrain.config.recipe import Config, load_config
from pretrain.engine.accelerators import DEVICES

PLANNED_FOR = (8, 64)
"""Numbers of H100s for which the comments of the large recipes have a plan."""
_GPU = "h100"
_COMMENT = re.compile(r"# Planned by .*\n(#   .*\n)+")


def overrides(choice: Choice) -> list[str]:
    """The words that choose a grid on a command line."""
    words = [
        f"grid.tensor_parallel={choice.tensor}", f"grid.pipeline_parallel={choice.pipeline}",
        f"grid.zero_stage={choice.zero_stage}", f"train.micro_batch={choice.micro_batch}",
    ]  # fmt: skip
    return [*words, "grid.activation_checkpointing=true"] if choice.recompute else words


def hours_of(config: Config, choice: Choice) -> float:
    """Hours of all updates; evaluations, measurements and checkpoints are not counted."""
    return choice.seconds["step"] * config.train.steps / 3600


def grid_in_words(choice: Choice) -> str:
    """``tensor 2 x pipeline 1 x data 4, ZeRO 1, micro batch 8, recomputed``."""
    again = ", recomputed" if choice.recompute else ""
    return (
        f"tensor {choice.tensor} x pipeline {choice.pipeline} x data {choice.data}, "
        f"ZeRO {choice.zero_stage}, micro batch {choice.micro_batch}{again}"
    )


def cost_in_words(config: Config, choice: Choice, count: int, price: float = 0.0) -> str:
    """``61 GB a GPU, 1.2 s a step, 40 hours, 321 GPU hours``, and what they cost.

    Args:
        price: of an hour of one GPU; 0: not known.
    """
    hours = hours_of(config, choice)
    total = hours * count
    cost = f", {_whole(total * price)} at {price:g} a GPU hour" if price else ""
    return (
        f"{choice.total / 1e9:.0f} GB a GPU, {choice.seconds['step']:.3g} s a step, "
        f"{_whole(hours)} hours, {_whole(total)} GPU hours{cost}"
    )


def _whole(number: float) -> str:
    """``1,226``, or ``0.73`` where a whole number would say little."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def with_plan(recipe: Path) -> str:
    """The text of a recipe, in whose comment the plan is current; unchanged if it has none.

    Data is not read, so that the plan is the same everywhere.
    """
    text = recipe.read_text(encoding="utf-8")
    if not _COMMENT.search(text):
        return text
    config, _ = with_vocabulary(load_config(recipe, ["data.path=''"]))
    return _COMMENT.sub(planned_comment(config), text, count=1)


def planned_comment(config: Config) -> str:
    """The lines of a recipe's comment that say its best grids, made from the plan."""
    lines = [f"# Planned by `pretrain plan` ({_GPU}; from formulas, not from measured runs):"]
    for count in PLANNED_FOR:
        best = rank(config, DEVICES[_GPU], count, 1)[0]
        if not best.fits:
            lines.append(f"#   {count} GPUs: too few")
            continue
        lines.append(f"#   {count} GPUs: {grid_in_words(best)}")
        lines.append(f"#     {cost_in_words(config, best, count)}")
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    for file in map(Path, sys.argv[1:]):
        file.write_text(with_plan(file), encoding="utf-8")

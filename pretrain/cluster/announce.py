"""What a run will need on a site's GPUs, said before it is submitted: memory, hours, cost."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from data_pipeline.records import DataError
from launchers.site import Site
from models.roles import ModelError
from pretrain.cli.console import plain, warn
from pretrain.cluster.plan import choose, rank
from pretrain.cluster.plan_words import cost_in_words, grid_in_words, overrides
from pretrain.cluster.vocabulary import with_vocabulary
from pretrain.config.recipe import Config
from pretrain.config.science import GridConfig
from pretrain.engine.accelerators import DEVICES, Device
from pretrain.errors import UsageError

_ASSUMED = "h100"


def say_what_it_needs(config: Config, site: Site, processes: int) -> None:
    """Print the plan of a recipe's own grid to standard error; nothing for a site without GPUs.

    A recipe that cannot be planned is still submitted, because the nodes may have what this machine
    lacks.
    """
    if not site.gpus_per_node:
        return
    try:
        config, remark = with_vocabulary(config)
        if remark:
            warn(remark)
        first, *warnings = needs(config, site, processes)
    except (UsageError, DataError, ModelError) as error:
        warn(f"not planned: {error}")
        return
    print(plain(first), file=sys.stderr, flush=True)
    for line in warnings:
        warn(line)


def needs(config: Config, site: Site, processes: int) -> Iterator[str]:
    """What a job will need in one line, and a second one if its grid does not fit.

    Args:
        config: with the size of its vocabulary.

    Raises:
        UsageError: if training would refuse the grid.
    """
    name, assumed = gpu_of(site)
    device = DEVICES[name]
    choice = choose(config, device, processes)
    cost = cost_in_words(config, choice, processes, site.gpu_hour_price)
    yield f"planned for {processes} x {name}{assumed}: {grid_in_words(choice)}: {cost}"
    if choice.fits:
        return
    words = _that_fit(config, device, processes)
    other = f"this fits: {' '.join(words)}" if words else "no grid of these GPUs fits"
    yield f"this grid does not fit into {device.memory:g} GB; {other}"


def _that_fit(config: Config, device: Device, processes: int) -> list[str]:
    """The words that choose the fastest grid that fits; none if no grid does."""
    train = config.train.model_copy(update={"micro_batch": 0})
    free = config.model_copy(update={"grid": GridConfig(), "train": train})
    try:
        best = rank(free, device, processes, 1)[0]
    except (UsageError, ModelError):
        return []
    return overrides(best) if best.fits else []


def gpu_of(site: Site) -> tuple[str, str]:
    """A site's GPU as the plan names it, and a remark if it is assumed."""
    if site.gpu:
        return site.gpu, ""
    named = site.skypilot.accelerators.partition(":")[0].lower()
    if named in DEVICES:
        return named, ""
    return _ASSUMED, " (assumed; the site file's key gpu names another)"

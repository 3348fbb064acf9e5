"""The keys in which runs differ, as far as each run records them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pretrain.config.compare import differences
from pretrain.config.recipe import Config
from pretrain.report.runs import RunData
from pretrain.runs.loop import flat


def varying(runs: Sequence[RunData], sections: Sequence[str]) -> list[str]:
    """The keys of these sections whose values differ among the runs that record them, in the order
    of a recipe."""
    first_of_kind = {run.recorded: run for run in reversed(runs)}.values()
    keys = {
        key
        for first in first_of_kind
        for run in runs
        for key in differences(first.config, run.config, tuple(sections))
        if first.records(key) and run.records(key)
    }
    return in_order(keys, runs[0].config)


def in_order(keys: Iterable[str], config: Config) -> list[str]:
    """Keys in the order of a recipe."""
    places = {key: place for place, key in enumerate(flat(config.model_dump(mode="json")))}
    return sorted(keys, key=lambda key: (places.get(key, len(places)), key))

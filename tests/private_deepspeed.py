"""What an engine in use shows of DeepSpeed's private side; for `tests.worker`."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from models.gpt import whole_model
from pretrain.config.recipe import Config
from pretrain.decay.plan import plan_decay
from pretrain.distributed.grid import Grid
from pretrain.engine import deepspeed_adapter, private
from pretrain.engine.engine import build_engine
from pretrain.errors import RunError


class Without:
    """An object that lacks one attribute, however deep it lies."""

    def __init__(self, whole: Any, dotted: str) -> None:
        self._whole, self._hidden = whole, dotted

    def __getattr__(self, name: str) -> Any:
        first, _, rest = self._hidden.partition(".")
        found = getattr(self._whole, name)
        if name == first and not rest:
            raise AttributeError(name)
        return Without(found, rest) if name == first and found is not None else found


@contextmanager
def kept_holders(kept: dict[str, list[Any]]) -> Iterator[None]:
    """Keep every object that an engine is checked for while it is built."""
    check = private.check_private

    def keep(stage: int, holders: dict[Any, Any], cases: Any = ()) -> None:
        kept.update(holders)
        check(stage, holders, cases)

    places = (deepspeed_adapter, build_engine.__globals__)
    deepspeed_adapter.check_private = places[1]["check_private"] = keep  # type: ignore[assignment, attr-defined]
    try:
        yield
    finally:
        deepspeed_adapter.check_private = places[1]["check_private"] = check  # type: ignore[attr-defined]


def run_private(case: dict[str, Any], grid: Grid, config: Config) -> dict[str, Any]:
    """Build an engine, hide every attribute by turns, and make one update.

    Returns:
        hidden: for each private attribute, the message once it is hidden.
        calls: how often one update called what is put in DeepSpeed's place, on all ranks.
    """
    infos = whole_model(config.model, grid.tensor)
    held: dict[str, list[Any]] = {}
    with kept_holders(held):
        engine = build_engine(config, grid, plan_decay(infos, config.optimizer.weight_decay))
    stage = config.grid.zero_stage
    cases: list[private.Case] = case["cases"]
    hidden = {}
    for one in private.used(stage, cases):
        if one.holder in held:
            without = [Without(each, one.name) for each in held[one.holder]]
            hidden[str(one)] = _message(stage, {**held, one.holder: without}, cases)
    calls: Counter[str] = Counter()
    for one in private.used(stage, cases):
        if one.use == "replaced" and one.holder != "class":
            for each in held[one.holder]:
                setattr(each, one.name, _counted(getattr(each, one.name), calls, str(one)))
    micro = config.train.global_batch // grid.data // engine.micro_batches
    tokens = torch.arange(micro * config.model.context).view(micro, -1) % 100
    engine.begin_step(0, 1e-3)
    engine.train_step(itertools.repeat((tokens, tokens)))
    norm = engine.gradient_norm
    engine.close()
    return {
        "hidden": hidden,
        "calls": dict(sum((Counter(one) for one in grid.gather(dict(calls))), Counter())),
        "class": type(held["optimizer"][0]).__name__,
        "norm": norm,
    }


def _message(stage: int, holders: dict[Any, Any], cases: list[private.Case]) -> str:
    try:
        private.check_private(stage, holders, cases)
    except RunError as error:
        return str(error)
    return ""


def _counted(function: Callable[..., Any], calls: Counter[str], name: str) -> Callable[..., Any]:
    def counted(*given: Any, **more: Any) -> Any:
        calls[name] += 1
        return function(*given, **more)

    return counted

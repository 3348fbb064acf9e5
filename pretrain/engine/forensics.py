"""Finds where a value that is not finite came from, after an update was skipped because of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from models.roles import declared_parameters, info_of

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, order=True)
class Nonfinite:
    """A value that is not finite; places compare by when an update computes them."""

    micro_batch: int
    """Counted from 1; 0 for a weight."""
    order: int
    text: str
    """``the weight NAME``, ``blocks.3.mlp in micro batch 1`` or ``the loss of micro batch 1``."""


def first_nonfinite(
    module: nn.Module, loss: Callable[[Batch], Tensor], batches: list[Batch]
) -> Nonfinite | None:
    """Find the first value of an update that is not finite, by repeating its forward pass.

    Args:
        module: the model; its weights must be those of the update, which a skipped one keeps.
        loss: computes the loss of a micro batch with ``module``.
        batches: the micro batches of the update.

    Returns:
        None if every value is finite.
    """
    places = [
        Nonfinite(0, number, f"the weight {info_of(parameter).name}")
        for number, parameter in enumerate(declared_parameters(module))
        if not bool(_own(parameter).isfinite().all())
    ]
    with torch.no_grad():
        for number, batch in enumerate(batches, 1):  # all of them: other processes wait in them
            with _watched(module) as found:
                value = loss(batch)
            places += [
                Nonfinite(number, order, f"{name} in micro batch {number}") for order, name in found
            ]
            if not bool(value.isfinite().all()):
                places.append(Nonfinite(number, sys.maxsize, f"the loss of micro batch {number}"))
    return min(places, default=None)


@contextmanager
def _watched(module: nn.Module) -> Iterator[list[tuple[int, str]]]:
    """Modules whose output is not finite: how many ended before, and the name."""
    found: list[tuple[int, str]] = []
    ended = 0

    def watch(name: str) -> Callable[..., None]:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            nonlocal ended
            ended += 1
            if not found and any(not bool(one.isfinite().all()) for one in _tensors(output)):
                found.append((ended, name))

        return look

    with ExitStack() as stack:
        for part in module.modules():
            names = [info_of(parameter).name for parameter in declared_parameters(part)]
            if names and part is not module:
                stack.callback(part.register_forward_hook(watch(_common(names))).remove)
        yield found


def _common(names: list[str]) -> str:
    """``blocks.1.mlp``: the parts with which all names begin."""
    parts = zip(*(name.split(".") for name in names), strict=False)
    return ".".join(part[0] for part in takewhile(lambda part: len(set(part)) == 1, parts))


def _own(parameter: nn.Parameter) -> Tensor:
    """A weight, or the part of it that this process holds under ZeRO 3."""
    part: Tensor = getattr(parameter, "ds_tensor", parameter)
    return part


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)

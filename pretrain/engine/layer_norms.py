"""Norms by layer and role: of weights, of gradients, and of what an update changed.

They are taken inside the optimizer's step, where decay is applied too (`pretrain.engine.shrink`):
gradients are final there under every ZeRO stage, and masters are what they were.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.logits import watched_logits
from models.roles import ParameterInfo
from pretrain.decay.sites import Site, site_of
from pretrain.distributed.grid import Grid
from pretrain.engine.deepspeed_adapter import counts_in_norms
from pretrain.engine.masters import Fragment
from pretrain.engine.norms import square_sum

KINDS = ("weights", "gradients", "updates")
Norms = dict[str, dict[Site, float]]
"""By kind, then by site."""


class NormMeter:
    """Measures one update when it is asked to, with a copy of this process's masters meanwhile.

    Args:
        infos: every parameter of the whole model.
        fragments: the elements that this process's optimizer owns.
        replicated: every data-parallel process owns the same.
    """

    def __init__(
        self,
        infos: Iterable[ParameterInfo],
        fragments: list[Fragment],
        grid: Grid,
        replicated: bool,
    ) -> None:
        self._sites = list(dict.fromkeys(site_of(info) for info in infos))
        self._fragments, self._grid = fragments, grid
        self._counts = not (replicated and grid.data_rank)
        self._by_owner: dict[int, list[Fragment]] = defaultdict(list)
        for fragment in fragments:
            if counts_in_norms(fragment.parameter):
                self._by_owner[id(fragment.owner)].append(fragment)
        self._armed = False
        self._before: dict[int, Tensor] = {}
        """Masters before the update, by the ``id`` of their owner."""
        self._gradients: dict[Site, Tensor] = {}

    def arm(self) -> None:
        """Measure the next update; what was kept of one that a fault undid is dropped."""
        self._armed, self._before, self._gradients = True, {}, {}

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at every step of ``optimizer``; to be called before decay takes part in it."""
        optimizer.register_step_pre_hook(lambda stepping, *_: self._before_step(stepping))

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._armed or not self._counts:
            return
        if not self._before:  # DeepSpeed makes several steps; decay comes with the first
            self._before = {
                id(one.owner): one.owner.detach().clone()
                for one in {id(one.owner): one for one in self._fragments}.values()
            }
        # What FlatUpdate leaves to a fused optimizer on a GPU: it divides the gradients by this.
        scale = getattr(optimizer, "grad_scale", None)
        for group in optimizer.param_groups:
            for owner in group["params"]:
                if owner.grad is not None:
                    self._add_gradients(owner, scale)

    def _add_gradients(self, owner: Tensor, scale: Tensor | None) -> None:
        assert owner.grad is not None
        flat = owner.grad.view(-1)
        for fragment in self._by_owner[id(owner)]:
            squares = square_sum(flat.narrow(0, fragment.start, fragment.master.numel()))
            if scale is not None:
                squares = squares / scale.double().square()
            site = site_of(fragment.info)
            self._gradients[site] = self._gradients.get(site, 0.0) + squares

    @torch.no_grad()
    def take(self) -> Norms | None:
        """The norms of the update that was measured; a collective call.

        Returns:
            None if no update was made.
        """
        made = bool(self._before)
        rows = torch.zeros(len(self._sites), len(KINDS), dtype=torch.float64)
        rows = rows.to(self._grid.device)
        place = {site: number for number, site in enumerate(self._sites)}
        for owner, fragments in self._by_owner.items():
            for fragment in fragments if made else ():
                before = (
                    self._before[owner].view(-1).narrow(0, fragment.start, fragment.master.numel())
                )
                row = rows[place[site_of(fragment.info)]]
                row[0] += square_sum(fragment.master)
                row[2] += square_sum(fragment.master - before)
        for site, squares in self._gradients.items():
            rows[place[site], 1] += squares
        self._armed, self._before, self._gradients = False, {}, {}
        flag = torch.full((1, len(KINDS)), float(made), dtype=torch.float64, device=rows.device)
        rows = torch.cat([rows, flag])
        if self._grid.world_size > 1:
            dist.all_reduce(rows)
        values = rows.sqrt().tolist()
        if not values[-1][0]:
            return None
        return {
            kind: {site: values[number][index] for site, number in place.items()}
            for index, kind in enumerate(KINDS)
        }


def largest_logits(module: nn.Module, forward: Callable[[], Any], grid: Grid) -> dict[int, float]:
    """The largest attention logit of each layer in a forward pass on all processes, by layer."""
    with torch.no_grad(), watched_logits(module) as found:
        forward()
    layers = sorted(found)
    if not layers:
        return {}
    values = torch.stack([found[layer] for layer in layers])
    if grid.world_size > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return dict(zip(layers, values.tolist(), strict=True))


def as_figures(norms: Norms) -> dict[str, Any]:
    """Norms by kind, role and layer, for metrics: ``{"weights": {"query": {"layer_00": 1.5}}}``."""
    layers = [layer for by_site in norms.values() for _, layer in by_site if layer is not None]
    digits = max(2, len(str(max(layers, default=0))))
    figures: dict[str, Any] = {}
    for kind, by_site in norms.items():
        for (role, layer), value in by_site.items():
            name = "outside" if layer is None else f"layer_{layer:0{digits}}"
            figures.setdefault(kind, {}).setdefault(role.value, {})[name] = value
    return figures

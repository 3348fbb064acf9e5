"""Applies weight decay in all its directions to fp32 masters, inside the optimizer's step.

DeepSpeed calls the innermost optimizer once for each flat piece of masters (ZeRO 1-3), or once in
total (ZeRO 0). The whole model's decay is applied in the first call of an update: gradients are
reduced and clipped, masters have not changed yet, and working copies are made from them afterwards.
So one place works for every ZeRO stage, precision and grid, and a skipped step decays nothing.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.config import GPTConfig
from models.gpt import attention_layers
from models.layers import shares_keys
from models.roles import ParameterInfo, info_of
from pretrain.decay.control import DecayControl
from pretrain.decay.nuclear import nuclear_subgradient
from pretrain.decay.policy import Policy
from pretrain.decay.sites import Applied, Site, label, site_of
from pretrain.distributed.grid import Grid
from pretrain.engine.deepspeed_adapter import counts_in_norms
from pretrain.engine.masters import Fragment, fragments, is_replicated, norm_in_step, tensors_of
from pretrain.engine.norms import square_sum
from pretrain.engine.optimizers import MuonWithAdamW, Updates, muon_update
from pretrain.engine.shards import (
    batched,
    local_shard,
    own_shard,
    place_in_stage,
    shard_from,
    sum_over_stage,
    whole_tensor,
)
from pretrain.errors import UsageError

_WITH_GRADIENT = frozenset(("l2", "cautious", "adadecay"))
"""Forms that need the gradient or the update of each piece of masters."""


class Shrinker:
    """Applies a `DecayControl` to the elements of the model that this process owns.

    Args:
        engine: the DeepSpeed engine; `attach` hooks into its innermost optimizer.
    """

    def __init__(
        self,
        engine: Any,
        module: nn.Module,
        grid: Grid,
        control: DecayControl,
        model: GPTConfig,
        slope: float,
        nuclear_every: int,
        native: bool,
    ) -> None:
        self._engine, self._module, self._grid = engine, module, grid
        self._control, self._model = control, model
        self._slope, self._nuclear_every, self.native = slope, nuclear_every, native
        self._replicated = is_replicated(engine)
        self._fragments = fragments(engine)
        self._tensors = tensors_of(engine)
        self._by_owner: dict[int, list[Fragment]] = defaultdict(list)
        self._by_name: dict[str, list[Fragment]] = defaultdict(list)
        for fragment in self._fragments:
            self._by_owner[id(fragment.owner)].append(fragment)
            self._by_name[fragment.info.name].append(fragment)
        self._needs_gradient = not _WITH_GRADIENT.isdisjoint(control.form.values())
        self._records_later = False
        """The device decides whether an update is made; `record` is called if it was."""
        self._fresh = False
        self._before: list[tuple[Fragment, Tensor, float]] = []
        self._applied: dict[Site, Applied] = {}

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Take part in every step of ``optimizer``."""
        self._records_later = bool(getattr(self._engine, "decides_on_device", False))
        optimizer.register_step_pre_hook(lambda stepping, *_: self._before_step(stepping))
        optimizer.register_step_post_hook(lambda *_: self._after_step())
        if isinstance(optimizer, MuonWithAdamW):
            optimizer.whole = self._orthogonalized

    def is_native(self, fragment: Fragment) -> bool:
        """Whether the optimizer's own decoupled decay serves the fragment's role."""
        return self.native and self._control.is_plain(fragment.info.role)

    @property
    def is_left_to_optimizer(self) -> bool:
        """Whether the optimizer's own decay is all there is, and no policy looks at an update."""
        plain = all(map(self._control.is_plain, self._control.form))
        return self.native and plain and not self._control.wanting("norms")

    def arm(self) -> None:
        """Prepare for an update (after `DecayControl.begin`)."""
        self._fresh = True

    def record(self) -> None:
        """Record the decay of an update that the device made (`is_left_to_optimizer`)."""
        if self._fresh:
            self._fresh = False
            self._control.commit()

    # --- inside the step ------------------------------------------------------------------------

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._records_later:
            return
        if self._fresh:
            self._fresh = False
            ratio = self._norm_ratio() if self._control.wanting("norms") else None
            self._applied = self._control.commit(ratio)
            self._decoupled()
            self._nuclear()
        if not self._needs_gradient:
            return
        for group in optimizer.param_groups:
            for owner in group["params"]:
                if owner.grad is not None:
                    self._with_gradient(owner)

    def _form(self, fragment: Fragment) -> str:
        return self._control.form[fragment.info.role]

    def _shrink(self, fragment: Fragment) -> float:
        return self._applied[site_of(fragment.info)].shrink

    def _decoupled(self) -> None:
        """w ← (1 − rate·λ)·w."""
        masters, factors = [], []
        for fragment in self._fragments:
            if self._form(fragment) == "decoupled" and not self.is_native(fragment):
                shrink = self._shrink(fragment)
                if shrink:
                    masters.append(fragment.master)
                    factors.append(1.0 - shrink)
        if masters:
            torch._foreach_mul_(masters, factors)

    def _with_gradient(self, owner: Tensor) -> None:
        """Apply the forms that need the gradient to the fragments in ``owner``."""
        own_fragments = self._by_owner[id(owner)]
        assert owner.grad is not None
        flat = owner.grad.view(-1)
        scores: dict[str, tuple[float, float]] = {}
        if any(self._control.form[info_of(p).role] == "adadecay" for p in self._tensors[id(owner)]):
            scores = self._gradient_scores(owner, flat)
        for fragment in own_fragments:
            form, shrink = self._form(fragment), self._shrink(fragment)
            if form not in _WITH_GRADIENT or not shrink:
                continue
            gradient = flat.narrow(0, fragment.start, fragment.master.numel())
            if form == "l2":
                # The optimizer multiplies by η, so a coupling other than lr is applied here.
                rate = self._control.rate_of(fragment.info.role)
                gradient.add_(fragment.master, alpha=shrink / rate if rate else 0.0)
            elif form == "adadecay":
                mean, deviation = scores[fragment.info.name]
                score = (gradient.abs().float() - mean) / deviation
                theta = 2.0 * torch.sigmoid(self._slope * score)
                fragment.master.mul_(1.0 - shrink * theta)
            else:
                self._before.append((fragment, fragment.master.clone(), shrink))

    @torch.no_grad()
    def _after_step(self) -> None:
        """Cautious decay (Chen et al. 2025, "Cautious weight decay"): only where the update and
        the weight have the same sign, so that decay never works against the optimizer."""
        for fragment, previous, shrink in self._before:
            agrees = (previous - fragment.master) * previous >= 0
            fragment.master.sub_(previous.mul_(agrees), alpha=shrink)
        self._before.clear()

    def _gradient_scores(self, owner: Tensor, flat: Tensor) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation of |g| of each whole tensor in ``owner`` (AdaDecay,
        Nakamura & Hong 2019)."""
        names = [info_of(parameter).name for parameter in self._tensors[id(owner)]]
        sums = torch.zeros(len(names), 3, dtype=torch.float64, device=flat.device)
        for fragment in self._by_owner[id(owner)]:
            sizes = flat.narrow(0, fragment.start, fragment.master.numel()).abs().double()
            row = sums[names.index(fragment.info.name)]
            row += torch.stack([sizes.sum(), sizes.square().sum(), sizes.new_tensor(sizes.numel())])
        sum_over_stage(sums, self._grid, self._replicated)
        scores = {}
        for name, (total, squares, count) in zip(names, sums.tolist(), strict=True):
            mean = total / max(1.0, count)
            variance = max(0.0, squares / max(1.0, count) - mean * mean)
            scores[name] = (mean, variance**0.5 or 1.0)
        return scores

    # --- forms that need the whole model or whole tensors
    # ----------------------------------------------

    def _norm_ratio(self) -> float:
        """‖∇‖₂/‖w‖₂ of the whole model, with the gradient before clipping."""
        gradient = norm_in_step(self._engine)
        total = torch.zeros((), dtype=torch.float64, device=self._grid.device)
        if not (self._replicated and self._grid.data_rank):
            for fragment in self._fragments:
                if counts_in_norms(fragment.parameter):
                    total += square_sum(fragment.master)
        if self._grid.world_size > 1:
            dist.all_reduce(total)
        weight = float(total.sqrt())
        return gradient / weight if weight else 0.0

    def _local(self, parameter: nn.Parameter) -> Tensor:
        """The whole local (tensor-parallel) shard of a parameter's master, flat."""
        own_fragments = self._by_name[info_of(parameter).name]
        parts = [(fragment.offset, fragment.master) for fragment in own_fragments]
        return local_shard(parameter, parts, self._grid, self._replicated)

    def _nuclear(self) -> None:
        """A ← A − rate·λ·U Vᵀ B, B ← B − rate·λ·V Uᵀ A: a step down λ‖A·Bᵀ‖_* for every head.

        Heads that share a key or value head count as one product (docs/statistics.md), so that this
        penalises directly what weight decay penalises at equilibrium.
        """
        every = self._nuclear_every
        if self._control.step % every or "nuclear" not in self._control.form.values():
            return
        for layer in attention_layers(self._module):
            pairs = ((layer.query, layer.key, "qk"), (layer.value, layer.output, "vo"))
            for left, right, pair in pairs:
                roles = info_of(left).role, info_of(right).role
                if self._control.form[roles[0]] != "nuclear":
                    continue
                directions = (
                    self._qk_directions(left, right)
                    if pair == "qk"
                    else self._vo_directions(left, right)
                )
                for parameter, whole in zip((left, right), directions, strict=True):
                    direction = self._own_part(parameter, whole)
                    for fragment in self._by_name[info_of(parameter).name]:
                        part = direction[fragment.offset :][: fragment.master.numel()]
                        fragment.master.sub_(part, alpha=self._shrink(fragment))

    def _of_whole_heads(self, parameter: nn.Parameter) -> Tensor:
        """The local shard, which has whole heads; the whole if processes share keys, flat."""
        local = self._local(parameter)
        if not shares_keys(self._model, self._grid.tensor):
            return local
        return whole_tensor(parameter, local, self._grid).reshape(-1)

    def _own_part(self, parameter: nn.Parameter, direction: Tensor) -> Tensor:
        """The local shard of what was computed from `_of_whole_heads`, flat."""
        if not shares_keys(self._model, self._grid.tensor):
            return direction
        return own_shard(parameter, direction.view(info_of(parameter).shape), self._grid)

    def _qk_directions(self, query: nn.Parameter, key: nn.Parameter) -> tuple[Tensor, Tensor]:
        head, width = self._model.head_size, self._model.hidden_size
        k = self._of_whole_heads(key).view(-1, head, width)
        q = self._of_whole_heads(query).view(k.shape[0], -1, head, width)
        units, group = q.shape[:2]
        stacked = q.transpose(2, 3).reshape(units, group * width, head)
        for_k, for_q = nuclear_subgradient(k.mT, stacked)
        gradient = for_q.view(units, group, width, head).transpose(2, 3)
        return gradient.reshape(-1), for_k.mT.reshape(-1)

    def _vo_directions(self, value: nn.Parameter, output: nn.Parameter) -> tuple[Tensor, Tensor]:
        head, width = self._model.head_size, self._model.hidden_size
        v = self._of_whole_heads(value).view(-1, head, width)
        units = v.shape[0]
        p = self._of_whole_heads(output).view(width, units, -1, head)
        group = p.shape[2]
        stacked = p.permute(1, 2, 0, 3).reshape(units, group * width, head)
        for_p, for_v = nuclear_subgradient(stacked, v.mT)
        gradient = for_p.view(units, group, width, head).permute(2, 0, 1, 3)
        return for_v.mT.reshape(-1), gradient.reshape(-1)

    def _orthogonalized(self, updates: Updates) -> list[Tensor]:
        """Muon's steps for the matrices in some owners: this process's parts of them.

        Each matrix is made whole and orthogonalised on one process of the stage, which shares it.
        """
        results = [torch.zeros_like(update).view(-1) for _, update in updates]
        matrices = [
            (parameter, owner, update.reshape(-1), result)
            for (owner, update), result in zip(updates, results, strict=True)
            for parameter in self._tensors[id(owner)]
        ]
        grid = self._grid
        for some in batched(matrices, grid.tensor * grid.data):
            mine: Tensor | None = None
            for place, (parameter, owner, flat, _) in enumerate(some):
                parts = [
                    (part.offset, flat.narrow(0, part.start, part.master.numel()))
                    for part in self._parts(parameter, owner)
                ]
                local = local_shard(parameter, parts, grid, self._replicated)
                whole = whole_tensor(parameter, local, grid)
                if place == place_in_stage(grid):
                    mine = whole
            # After the last matrix has come: the others do not wait for this process meanwhile.
            step = None if mine is None else muon_update(mine)
            for place, (parameter, owner, _, result) in enumerate(some):
                own = shard_from(place, step, parameter, grid)
                for part in self._parts(parameter, owner):
                    size = part.master.numel()
                    result.narrow(0, part.start, size).copy_(own[part.offset : part.offset + size])
        return results

    def _parts(self, parameter: nn.Parameter, owner: Tensor) -> list[Fragment]:
        """The fragments of a parameter in an owner."""
        return [part for part in self._by_owner[id(owner)] if part.parameter is parameter]

    @torch.no_grad()
    def figures(self, policy: Policy) -> dict[str, float]:
        """A policy's figure of every matrix that it measures, by site label; collective.

        The matrices of a stage are divided among its processes.

        Raises:
            UsageError: on every rank, if the policy's code fails on one.
        """
        grid, problem = self._grid, ""
        mine: dict[str, float] = {}
        measured = [one for one in self._module.parameters() if policy.measures(info_of(one))]
        for some in batched(measured, grid.tensor * grid.data):
            own: tuple[ParameterInfo, Tensor] | None = None
            for place, parameter in enumerate(some):
                matrix = whole_tensor(parameter, self._local(parameter), grid)
                if place == place_in_stage(grid):
                    own = info_of(parameter), matrix
            if own is not None:  # after the last matrix has come, so that all compute at once
                try:
                    mine[label(site_of(own[0]))] = policy.figure(*own)
                except UsageError as error:  # the others wait in the next collective
                    problem = problem or str(error)
        figures: dict[str, float] = {}
        for part, wrong in grid.gather((mine, problem)):
            if wrong:
                raise UsageError(wrong)
            figures |= part
        return dict(sorted(figures.items()))

"""The update rules, as torch optimizers; their own weight decay is off, except AdamW's.

Under ZeRO an optimizer sees flat pieces of many tensors. This does not matter for AdamW, SGD and
Lion, which work element by element. Muon needs whole matrices and requests them
(`MuonWithAdamW.whole`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models.roles import ATTENTION, MLP, Role, declared_parameters, info_of
from pretrain.config.science import OptimizerConfig
from pretrain.decay.plan import DecayPlan
from pretrain.engine.norms import square_sum
from pretrain.errors import UsageError

Groups = list[dict[str, Any]]
Updates = list[tuple[Tensor, Tensor]]
"""What an optimizer updates, each with its update, which may be flat."""
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic Newton-Schulz iteration (Jordan et al. 2024)."""
_ITERATIONS = 5
_NOT_SETTINGS = ("params", "name", "muon")
"""Entries of a param group that AdamW does not read as settings."""


def optimizer_groups(module: nn.Module, plan: DecayPlan) -> Groups:
    """Param groups of this process's parameters, in the plan's order, without empty groups."""
    group_of = plan.group_of
    members: dict[str, list[nn.Parameter]] = {group.name: [] for group in plan.groups}
    for parameter in declared_parameters(module):
        members[group_of[info_of(parameter).name]].append(parameter)
    return [
        {
            "name": name,
            "params": parameters,
            "weight_decay": 0.0,  # set, like η, before every step
            "muon": is_muon_role(plan.group(name).role),
        }
        for name, parameters in members.items()
        if parameters
    ]


def build_optimizer(config: OptimizerConfig, groups: Groups) -> torch.optim.Optimizer:
    """The optimizer of a recipe over named groups with ``weight_decay``; η is set every step.

    Raises:
        UsageError: if Lion's package is not installed.
    """
    # η is 0 until the first step sets it, so that a constructor cannot decay anything.
    betas, rate = (config.beta1, config.beta2), 0.0
    if config.name == "adamw":
        return MergedAdamW(groups, lr=rate, betas=betas, eps=config.epsilon, fused=True)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=config.momentum)
    if config.name == "muon":
        return MuonWithAdamW(groups, rate, betas, config.epsilon, config.momentum)
    lion: torch.optim.Optimizer = _lion()(groups, lr=rate, betas=betas, weight_decouple=True)
    return lion


def refuse_missing_optimizer(config: OptimizerConfig) -> None:
    """Refuse an optimizer whose package is not installed.

    Raises:
        UsageError: naming the key and the package.
    """
    if config.name == "lion":
        _lion()


def _lion() -> Any:
    try:
        from pytorch_optimizer import Lion
    except ImportError:
        raise UsageError(
            "optimizer.name: lion needs pytorch-optimizer: pip install pytorch-optimizer"
        ) from None
    return Lion


def is_muon_role(role: Role) -> bool:
    """Whether Muon updates the role: matrices inside the blocks."""
    return role in ATTENTION + MLP


def rule_of(name: str, role: Role) -> str:
    """The update rule that an optimizer of the recipe has for a role, which defines its moments."""
    if name == "muon" and not is_muon_role(role):
        return "adamw"
    return name


def _without_hooks(step: Any) -> Any:
    """The step of a class as it is before PyTorch wraps it, at the first object, to call hooks."""
    return inspect.unwrap(step, stop=lambda one: not getattr(one, "hooked", False))


_adamw_step = _without_hooks(torch.optim.AdamW.step)


class MergedAdamW(torch.optim.AdamW):
    """AdamW that updates groups with the same settings together, as they are at the step.

    The groups of a decay plan differ in their names, and seldom in more than two values of λ.
    """

    def step(self, closure: Any = None) -> Any:
        """Make one update."""
        groups = self.param_groups
        self.param_groups = _merged(groups)
        try:
            return _adamw_step(self, closure)
        finally:
            self.param_groups = groups


def _merged(groups: Groups) -> Groups:
    """One group for each set of settings, whatever the groups' names."""
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for group in groups:
        settings = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in group.items()
            if key not in _NOT_SETTINGS
        }
        same = merged.setdefault(tuple(sorted(settings.items())), settings | {"params": []})
        same["params"].extend(group["params"])
    return list(merged.values())


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for groups with ``muon`` true, AdamW for the others.

    A matrix moves by η·0.2·√max(rows, columns) times its orthogonalised Nesterov momentum. This has
    AdamW's usual root mean square (Liu et al. 2025, "Muon is scalable"), so one learning rate works
    for both. All computations are in float32, unlike torch.optim.Muon's bfloat16 iteration, so that
    the update does not depend on the process grid. It has no weight decay of its own.
    """

    def __init__(
        self,
        groups: Groups,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "momentum": momentum, "muon": False}
        super().__init__(groups, {**defaults, "weight_decay": 0.0})
        self.whole: Callable[[Updates], list[Tensor]] = _each_matrix
        """A function of a group's updates -> these, orthogonalised."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make one update."""
        for group in self.param_groups:
            owners = [owner for owner in group["params"] if owner.grad is not None]
            if group["muon"]:
                self._muon(owners, group)
                continue
            for owner in owners:
                self._adamw(owner, group)

    def _muon(self, owners: list[Tensor], group: dict[str, Any]) -> None:
        updates = [(owner, self._momentum(owner, group["momentum"])) for owner in owners]
        for owner, update in zip(owners, self.whole(updates), strict=True):
            owner.add_(update.view_as(owner), alpha=-group["lr"])

    def _momentum(self, owner: Tensor, momentum: float) -> Tensor:
        """Nesterov's momentum."""
        state, gradient = self.state[owner], owner.grad
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(owner)
        buffer: Tensor = state["momentum_buffer"]
        buffer.lerp_(gradient, 1.0 - momentum)
        return gradient.lerp(buffer, momentum)

    def _adamw(self, owner: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[owner], owner.grad
        assert gradient is not None
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(owner), torch.zeros_like(owner)
        state["step"] = float(state.get("step", 0.0)) + 1.0
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(gradient, 1.0 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        correction = math.sqrt(1.0 - beta2 ** state["step"])
        denominator = (state["exp_avg_sq"].sqrt() / correction).add_(group["eps"])
        size = group["lr"] / (1.0 - beta1 ** state["step"])
        owner.addcdiv_(state["exp_avg"], denominator, value=-size)


def _each_matrix(updates: Updates) -> list[Tensor]:
    return [muon_update(update.view_as(owner)) for owner, update in updates]


def muon_update(momentum: Tensor) -> Tensor:
    """The step of a whole matrix for learning rate 1: about 0.2·√max(rows, columns)·U Vᵀ.

    Args:
        momentum: ``[rows, columns]`` float32.
    """
    return orthogonalize(momentum).mul_(0.2 * math.sqrt(max(momentum.shape)))


def orthogonalize(matrix: Tensor, iterations: int = _ITERATIONS) -> Tensor:
    """Bring singular values into about [0.7, 1.2] and keep singular vectors (Newton-Schulz)."""
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / square_sum(x).sqrt().float().clamp_min(1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).contiguous()

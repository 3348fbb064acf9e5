"""Short runs under every decay policy, in plain torch and numpy, from the formulas alone.

The formulas are in ``tests/by_hand_formulas.py``, with their sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.dataset import TrainingData
from data_pipeline.manifest import load_manifest
from models.gpt import GPT
from models.layers import ParameterFactory
from models.loss import mean_loss
from models.roles import ATTENTION, MLP, Role, info_of
from pretrain.config.recipe import Config, parse_config
from pretrain.tasks.text import Text
from tests import by_hand_formulas as formulas
from tests.tools import DIALECTS, base_recipe

STEPS = 4
SCHEDULE = {"kind": "schedule", "roles": ["attention"]}
POLICIES: dict[str, dict[str, Any]] = {
    "constant": {},
    "linear": {"policies": [{**SCHEDULE, "shape": "linear", "last": 0.25}]},
    "cosine": {"policies": [{**SCHEDULE, "shape": "cosine", "start": 1, "stop": 3}]},
    "step": {"policies": [{**SCHEDULE, "shape": "step", "start": 2, "last": 3.0}]},
    "warmup": {"policies": [{**SCHEDULE, "shape": "warmup", "stop": 3}]},
    "window": {"policies": [{**SCHEDULE, "shape": "window", "start": 1, "stop": 0.75}]},
    "lr2": {"coupling": {"attention": "lr2"}},
    "none": {"coupling": "none", "default": 0.003, "attention": 0.008, "bias": 0.001},
    "l2": {"form": "l2"},
    "l2_lr2": {"form": {"attention": "l2"}, "coupling": {"attention": "lr2"}},
    "cautious": {"form": "cautious"},
    "adadecay": {"form": "adadecay"},
    "nuclear": {"form": {"attention": "nuclear"}},
    "awd": {"policies": [{"kind": "awd"}]},
    "awd_decoupled": {"policies": [{"kind": "awd", "form": "decoupled", "roles": ["qk"]}]},
    "alpha": {"policies": [{"kind": "alpha", "refresh": 2, "min_eigenvalues": 8}]},
    "alpha_mean": {
        "policies": [
            {"kind": "alpha", "refresh": 3, "min_eigenvalues": 8, "normalize_mean": True,
             "hill": "released", "roles": ["attention", "mlp_in"]},
            {**SCHEDULE, "shape": "linear"},
        ]
    },
    "rank_target": {
        "policies": [{"kind": "rank_target", "target": 0.3, "every": 1, "start": 0, "until": 0.5}]
    },
}  # fmt: skip


SCHEDULED = ("linear", "cosine", "step", "warmup", "window", "alpha_mean")
"""Cases with a schedule for attention."""


def recipe(
    data: Path, decay: dict[str, Any], optimizer: str = "sgd", dialect: str = "gpt2"
) -> dict[str, Any]:
    values = deepcopy(base_recipe(data))
    values["model"] |= DIALECTS[dialect]
    values["train"] = {"steps": STEPS, "global_batch": 8}
    values["optimizer"] = {
        "name": optimizer,
        # SGD moves little at this rate, so that decay is much of what happens.
        "learning_rate": 0.05 if optimizer == "sgd" else 3e-3,
        "gradient_clipping": 0.0,
        "schedule": {"kind": "linear", "warmup": 1, "final_fraction": 0.2},
        "weight_decay": {"default": 0.4, "attention": 1.5, "bias": 0.2, **decay},
    }
    if dialect == "llama":
        del values["optimizer"]["weight_decay"]["bias"]
    values["checkpoint"] = {"every": STEPS - 1, "keep": 0}
    # Heads of 8 dimensions all need more than 95 %; only a target asks before each update.
    targeted = any(one["kind"] == "rank_target" for one in decay.get("policies", ()))
    values["ranks"] = {"every": 1 if targeted else STEPS, "threshold": 0.5}
    values["evaluation"] = {"every": STEPS, "documents": 1, "batch": 24, "at_end": "none"}
    return values


# --- by hand --------------------------------------------------------------------------------


class ByFormula:
    """Lion (Chen et al. 2023, algorithm 2) and Muon (Jordan et al. 2024) in float64."""

    def __init__(self, named: dict[str, torch.nn.Parameter], name: str) -> None:
        self.named, self.name = named, name
        self.param_groups: list[dict[str, float]] = [{"lr": 0.0}]
        self.first = {key: torch.zeros_like(p).double() for key, p in named.items()}
        self.second = {key: torch.zeros_like(p).double() for key, p in named.items()}
        self.count = 0

    def zero_grad(self) -> None:
        for p in self.named.values():
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        rate, self.count = self.param_groups[0]["lr"], self.count + 1
        for key, p in self.named.items():
            assert p.grad is not None
            g, m, v = p.grad.double(), self.first[key], self.second[key]
            if self.name == "lion":
                update = (0.9 * m + 0.1 * g).sign()
                m.mul_(0.95).add_(g, alpha=0.05)
            elif info_of(p).role in ATTENTION + MLP:
                m.mul_(0.95).add_(g, alpha=0.05)
                update = self.orthogonal(0.95 * m + 0.05 * g) * 0.2 * math.sqrt(max(p.shape))
            else:
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.95).add_(g * g, alpha=0.05)
                root = (v / (1 - 0.95**self.count)).sqrt() + 1e-8
                update = m / (1 - 0.9**self.count) / root
            p.sub_((rate * update).float())

    @staticmethod
    def orthogonal(x: torch.Tensor) -> torch.Tensor:
        """The quintic on each singular value, by an SVD."""
        u, sigma, vh = torch.linalg.svd(x / x.norm(), full_matrices=False)
        for _ in range(5):
            sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
        product: torch.Tensor = (u * sigma) @ vh
        return product


class Hand:
    """The same run in plain torch and numpy, from the formulas alone."""

    def __init__(self, values: dict[str, Any], data: Path) -> None:
        manifest = load_manifest(data)
        self.config: Config = parse_config(values)
        model = Text(manifest).complete(self.config.model)
        self.config = self.config.model_copy(update={"model": model})
        config = self.config
        self.model = GPT(config.model, ParameterFactory(config.seed))
        self.named = {info_of(p).name: p for p in self.model.parameters()}
        self.data = TrainingData(
            manifest, "proportional", config.model.context, config.seed, STEPS * 8
        )
        self.rate = [config.learning_rate(step) for step in range(STEPS)]
        name = config.optimizer.name
        parameters = list(self.named.values())
        if name in ("lion", "muon"):
            self.optimizer: Any = ByFormula(self.named, name)
        elif name == "sgd":
            self.optimizer = torch.optim.SGD(parameters, lr=1.0, momentum=0.95)
        else:
            self.optimizer = torch.optim.AdamW(
                parameters, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True
            )
        self.multipliers: dict[str, float] = {}
        self.awd = 0.0

    def gradients(self, step: int) -> None:
        pairs = [self.data[step * 8 + i] for i in range(8)]
        inputs, labels = (torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))
        self.optimizer.zero_grad()
        self.model(inputs, partial(mean_loss, labels=labels)).backward()

    def move(self, step: int) -> None:
        self.optimizer.param_groups[0]["lr"] = self.rate[step]
        self.optimizer.step()

    def base(self, name: str) -> float:
        decay = self.config.optimizer.weight_decay
        role = info_of(self.named[name]).role
        if role is Role.NORM:
            return 0.0
        if role is Role.BIAS:
            return float(decay.bias or 0.0)
        return float(decay.attention or 0.0) if role in ATTENTION else decay.default

    def role(self, name: str) -> Role:
        return info_of(self.named[name]).role


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def alpha_by_hand(hand: Hand, case: str) -> dict[str, float]:
    """The multiplier of every matrix that the case's policy measures."""
    roles = ATTENTION + MLP if case == "alpha" else (*ATTENTION, Role.MLP_IN)
    exponent = formulas.paper_hill if case == "alpha" else formulas.released_hill
    exponents = {
        name: exponent(p.detach().numpy())
        for name, p in hand.named.items()
        if hand.role(name) in roles
    }
    multipliers = formulas.alpha_multipliers(exponents)
    return formulas.with_mean_one(multipliers) if case == "alpha_mean" else multipliers


def awd_by_hand(hand: Hand) -> float:
    """The average of ‖∇‖/‖w‖ after this update's."""
    with torch.no_grad():
        gradient = math.sqrt(sum(float(gradient_of(p).square().sum()) for p in hand.named.values()))
        size = math.sqrt(sum(float(p.square().sum()) for p in hand.named.values()))
    return formulas.awd_average(hand.awd, gradient, size)


def nuclear_by_hand(hand: Hand, name: str) -> torch.Tensor:
    """The gradient of a layer's nuclear norms by one of its attention weights."""
    layer, part, _ = name.rsplit(".", 2)
    parts = {
        part: hand.named[f"{layer}.{part}.weight"] for part in ("query", "key", "value", "output")
    }
    return formulas.nuclear_gradient(parts, 4, part)


def rate_of(case: str, role: Role) -> Callable[[float, float], float]:
    """The formula of the rate in a case."""
    if case in ("lr2", "l2_lr2") and role in ATTENTION:
        return formulas.squared_rate
    return formulas.independent_rate if case == "none" else formulas.coupled_rate


def form_of(case: str, role: Role) -> str:
    """The direction in a case."""
    if case in ("l2", "cautious", "adadecay"):
        return case
    if role in ATTENTION and case in ("l2_lr2", "nuclear"):
        return case.removesuffix("_lr2")
    return "l2" if case == "awd" and role in ATTENTION + MLP else "decoupled"


def decay_of(case: str, hand: Hand, name: str, step: int) -> float:
    """λ of a parameter in an update."""
    role, decay = hand.role(name), hand.base(name)
    if case in SCHEDULED and role in ATTENTION:
        decay *= formulas.schedule(case, step)
    return decay * hand.multipliers.get(name, 1.0)


def shrink_of(case: str, hand: Hand, name: str, step: int) -> float:
    """rate · λ of a parameter in an update."""
    role, peak = hand.role(name), max(hand.config.optimizer.learning_rate, 0.0)
    shrink = rate_of(case, role)(hand.rate[step], peak) * decay_of(case, hand, name, step)
    roles = {"awd": ATTENTION + MLP, "awd_decoupled": (Role.QUERY, Role.KEY)}.get(case, ())
    return shrink * hand.awd if role in roles else shrink


def run_by_hand(case: str, hand: Hand) -> None:
    """Four updates."""
    for step in range(STEPS):
        hand.gradients(step)
        policies: list[Any] = list(hand.config.optimizer.weight_decay.policies)
        if case.startswith("alpha") and step % policies[0].refresh == 0:
            hand.multipliers = alpha_by_hand(hand, case)
        if case.startswith("awd"):
            hand.awd = awd_by_hand(hand)
        forms = {name: form_of(case, hand.role(name)) for name in hand.named}
        nuclear = {
            name: nuclear_by_hand(hand, name) for name in hand.named if forms[name] == "nuclear"
        }
        before = {name: p.detach().clone() for name, p in hand.named.items()}
        shrinks = {name: shrink_of(case, hand, name, step) for name in hand.named}
        with torch.no_grad():
            for name, p in hand.named.items():
                shrink = shrinks[name]
                if forms[name] == "l2":
                    gradient_of(p).add_(formulas.l2_gradient(before[name], shrink, hand.rate[step]))
                elif forms[name] == "adadecay":
                    p.mul_(formulas.adadecay_factor(gradient_of(p), shrink))
                elif forms[name] == "nuclear":
                    p.sub_(shrink * nuclear[name])
                elif forms[name] == "decoupled":
                    p.mul_(formulas.decoupled_factor(shrink))
        hand.move(step)
        with torch.no_grad():
            for name, p in hand.named.items():
                if forms[name] == "cautious":
                    p.sub_(formulas.cautious_amount(before[name], p, shrinks[name]))

"""λ during a run: base values by role and layer, changed by policies, with a record of decay.

`DecayControl` gives the λ of every (role, layer) in the coming update and records the applied
decay.
It is the same on every process: it depends only on the step, on figures that every process has
(measured ranks, exponents, norms), and on its saved state. `pretrain.engine.shrink` applies λ to
weights.
"""

from __future__ import annotations

import hashlib
from typing import Any, get_args

from data_pipeline.strict_json import to_json
from models.roles import ParameterInfo, Role
from pretrain.config.decay import Form
from pretrain.config.recipe import Config
from pretrain.decay.by_role import by_role, check_directions, named, rate_factors
from pretrain.decay.plan import DecayPlan
from pretrain.decay.policy import Policy, PolicySection, Setting, Want
from pretrain.decay.registry import make_policy
from pretrain.decay.sites import (
    KEY,
    Applied,
    DecayRecord,
    DecayRecords,
    Site,
    coupled_rate,
    label,
    site_of,
)
from pretrain.errors import UsageError


class DecayControl:
    """λ, rate and direction of every site, and the sums of the applied decay.

    Raises:
        UsageError: if a policy, coupling or form names something that this model lacks, or if two
            of them exclude each other.
    """

    def __init__(self, config: Config, plan: DecayPlan) -> None:
        decay = config.optimizer.weight_decay
        infos = [info for group in plan.groups for info in group.parameters]
        roles = frozenset(info.role for info in infos)
        self._config, self._plan = config, plan
        self._peak = config.optimizer.learning_rate
        self.base = {site_of(info): plan.by_name[info.name] for info in infos}
        self.coupling = by_role(decay.coupling, f"{KEY}.coupling", "lr", roles)
        self.form = by_role(decay.form, f"{KEY}.form", "decoupled", roles)
        self._factors = rate_factors(config.optimizer.learning_rate_by, roles)
        self.policies: list[Policy] = []
        for index, section in enumerate(decay.policies):
            moved = named(section.roles, f"{KEY}.policies[{index}].roles", roles)
            setting = self._setting(f"{KEY}.policies[{index}]", moved, infos)
            policy = make_policy(section, setting)
            if policy.form is not None:
                _check_form(policy.form, setting.key)
                self.form |= dict.fromkeys(moved, policy.form)
            self.policies.append(policy)
        self._check_policies()
        check_directions(self.form, self.coupling, self.base, decay.nuclear_every)
        self._nuclear_every = decay.nuclear_every
        self.used: dict[Site, Applied] = {}
        self.exposure = dict.fromkeys(self.base, 0.0)
        self.retention = dict.fromkeys(self.base, 1.0)
        self._step, self._rate = 0, 0.0

    def _setting(self, key: str, roles: frozenset[Role], infos: list[ParameterInfo]) -> Setting:
        """The information about the run for a policy."""
        config, model = self._config, self._config.model
        return Setting(
            key=key,
            roles=roles,
            parameters=tuple(info for info in infos if info.role in roles),
            base={site: decay for site, decay in self.base.items() if site[0] in roles},
            steps=config.train.steps,
            coupling={role: self.coupling[role] for role in roles},
            rate=self._rate_at,
            model=model,
            threshold=config.ranks.threshold,
            full_rank=(
                min(1.0, model.head_size / model.hidden_size)
                if config.ranks.denominator == "model"
                else 1.0
            ),
        )

    def _rate_at(self, role: Role, step: int) -> float:
        """The rate that multiplies λ of a role in an update."""
        return self._coupled(role, self._config.learning_rate(step))

    def _coupled(self, role: Role, rate: float) -> float:
        """The rate that multiplies λ of a role, for η of the recipe's schedule."""
        factor = self._factors[role]
        return coupled_rate(self.coupling[role], factor * rate, factor * self._peak)

    def _check_policies(self) -> None:
        """Refuse two policies that both react to measurements: one would undo the other."""
        movers: dict[Role, str] = {}
        for section, policy in zip(self._sections, self.policies, strict=True):
            if policy.wants is None:
                continue
            for role in sorted(policy.roles):
                if role in movers:
                    raise UsageError(
                        f"{KEY}.policies: {role} is changed by {movers[role]} and by "
                        f"{section.kind}, which both react to measurements; keep one of them (you "
                        "can add schedules to it)"
                    )
                movers[role] = section.kind

    @property
    def _sections(self) -> list[PolicySection]:
        return self._config.optimizer.weight_decay.policies

    def is_plain(self, role: Role) -> bool:
        """Whether λ of the role is constant, decoupled and at rate η, as in any AdamW."""
        moved = any(role in policy.roles for policy in self.policies)
        return not moved and self.coupling[role] == "lr" and self.form[role] == "decoupled"

    def is_adaptive(self, role: Role) -> bool:
        """Whether λ of the role depends on measurements during training."""
        return any(role in policy.roles for policy in self.policies if policy.wants)

    def moves_layers_apart(self, role: Role) -> bool:
        """Whether λ of the role may differ between layers."""
        return any(policy.per_layer and role in policy.roles for policy in self.policies)

    def alike(self, site: Site) -> tuple[object, ...]:
        """A key: sites that share it have the same λ and rate in every update."""
        role = site[0]
        moved = any(role in policy.roles for policy in self.policies)
        here = site if moved else None
        return self.base[site], self.coupling[role], self.form[role], self._factors[role], here

    def wanting(self, want: Want) -> list[Policy]:
        """The policies that observe something."""
        return [policy for policy in self.policies if policy.wants == want]

    # --- one update -----------------------------------------------------------------------------

    def begin(self, step: int, rate: float) -> None:
        """Announce the coming update: its number, counted from 0, and its learning rate η."""
        self._step, self._rate = step, rate

    @property
    def step(self) -> int:
        """Number of the update that `begin` announced."""
        return self._step

    def rate_of(self, role: Role) -> float:
        """η of that update for a role."""
        return self._factors[role] * self._rate

    def now(self, site: Site) -> Applied:
        """λ and rate at a site in the coming update, as known before its gradient."""
        decay = self.base[site]
        for policy in self.policies:
            if site[0] in policy.roles:
                decay = policy.move(site, decay, self._step)
        rate = self._coupled(site[0], self._rate)
        every = self._nuclear_every if self.form[site[0]] == "nuclear" else 1
        return Applied(decay, rate, 0 if self._step % every else every)

    def commit(self, ratio: float | None = None) -> dict[Site, Applied]:
        """Fix the decay of the update and record it; called once per update.

        Args:
            ratio: ‖∇‖₂/‖w‖₂ of the whole model, if a policy needs ``norms``.
        """
        if ratio is not None:
            for policy in self.wanting("norms"):
                policy.observe(ratio, self._step)
        self.used = {site: self.now(site) for site in self.base}
        for site, applied in self.used.items():
            self.exposure[site] += applied.shrink
            self.retention[site] *= 1.0 - applied.shrink
        return self.used

    def in_use(self) -> dict[str, float]:
        """λ of the last update, for the log: by group, or by layer if policies distinguish them."""
        decays: dict[str, float] = {}
        for group in self._plan.groups:
            by_layer = self.moves_layers_apart(group.role)
            for info in group.parameters:
                site = site_of(info)
                applied = self.used.get(site) or self.now(site)
                decays[label(site) if by_layer else group.name] = applied.decay
        return decays

    def books(self) -> DecayRecords:
        """The decay applied so far at every site."""
        return {
            label(site): DecayRecord(
                (self.used.get(site) or self.now(site)).decay,
                self.exposure[site],
                self.retention[site],
            )
            for site in self.base
        }

    def fingerprints(self) -> dict[str, str]:
        """Hashes of what must be equal on every process: each policy, and the record of decay."""
        parts: dict[str, Any] = {
            f"{KEY}.policies[{index}] ({section.kind})": [section.model_dump(), policy.state()]
            for index, (section, policy) in enumerate(
                zip(self._sections, self.policies, strict=True)
            )
        }
        parts["λ as applied"] = list(self.exposure.values())
        return {
            name: hashlib.sha256(to_json(part).encode()).hexdigest() for name, part in parts.items()
        }

    # --- saved with the run ---------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The state that a resumed run needs (JSON)."""
        return {
            "policies": [policy.state() for policy in self.policies],
            "books": {
                name: [book.decay, book.exposure, book.retention]
                for name, book in self.books().items()
            },
        }

    def restore(self, state: dict[str, Any], same_policies: bool) -> None:
        """Restore a saved state.

        Args:
            same_policies: False for a fork with other policies: they start from the beginning, and
                the record of decay continues.
        """
        for site in self.base:
            _, self.exposure[site], self.retention[site] = state["books"][label(site)]
        if same_policies:
            for policy, saved in zip(self.policies, state["policies"], strict=True):
                policy.restore(saved)


def _check_form(form: str, key: str) -> None:
    if form not in get_args(Form):
        raise UsageError(
            f"{key}: has the form {form!r}; it must be one of {', '.join(get_args(Form))}"
        )

"""λ while a run goes on: base values by role and layer, moved by policies, with its books.

`DecayControl` says which λ holds for every (role, layer) in the coming update, keeps the sum of
what was applied, and is the same on every rank: it depends on the step, on figures that every rank
has (measured ranks, exponents, norms), and on its saved state alone. How a λ is applied to
weights is `pretrain.engine.shrink`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from models.roles import ALIASES, QK, VO, ParameterInfo, Role
from pretrain.config.decay import AdaptiveDecay, AlphaDecay, ScheduleDecay
from pretrain.config.recipe import Config
from pretrain.config.schedule import decay_multiplier
from pretrain.decay.plan import KEY, DecayPlan, roles_of
from pretrain.decay.policies.alpha import alpha_multipliers
from pretrain.decay.policies.rank_target import RankController
from pretrain.errors import UsageError

Site = tuple[Role, int | None]
"""A role in a block (None: outside the blocks): the finest place that has a λ of its own."""

_MOST_A_STEP = 0.01
"""With ``coupling: none`` a larger λ forgets a weight within a hundred updates."""


@dataclass(frozen=True)
class Book:
    """What decay has done at a site."""

    decay: float
    """λ of the last update."""
    exposure: float
    """Σ rate·λ over the updates so far."""
    retention: float
    """∏ (1 − rate·λ): what would be left of a weight that nothing else moves."""


Books = dict[str, Book]
"""By site label."""


def site_of(info: ParameterInfo) -> Site:
    """Where a parameter belongs."""
    return info.role, info.layer


def label(site: Site) -> str:
    """``query[3]``, or ``head`` outside the blocks."""
    role, layer = site
    return role.value if layer is None else f"{role.value}[{layer}]"


@dataclass(frozen=True)
class Applied:
    """What one update does at a site: w ← w − times·rate·λ·direction."""

    decay: float
    rate: float
    times: int = 1
    """Updates that this one stands for: with ``nuclear_every`` n it is n in every n-th update,
    else 0."""

    @property
    def shrink(self) -> float:
        """times·rate·λ: what is taken."""
        return self.times * (self.decay * self.rate)


def coupled_rate(coupling: str, rate: float, peak: float) -> float:
    """The rate that λ is multiplied by in an update.

    Args:
        coupling: ``lr``: η; ``lr2``: η²/η_peak; ``none``: 1.
        rate: η of the update.
        peak: the largest η of the recipe.
    """
    if coupling == "none":
        return 1.0
    if coupling == "lr2":
        return rate * rate / peak if peak else 0.0
    return rate


class Policy(Protocol):
    """Moves λ at the sites of its roles."""

    roles: frozenset[Role]
    per_layer: bool

    def move(self, site: Site, decay: float, step: int) -> float:
        """λ in the update number ``step`` from the λ so far."""

    def state(self) -> dict[str, Any]:
        """What a resumed run must know (JSON)."""

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""


class _Schedule:
    """A multiplier that is a function of the step."""

    per_layer = False

    def __init__(self, config: ScheduleDecay, roles: frozenset[Role], steps: int) -> None:
        self.roles, self._config, self._steps = roles, config, steps

    def move(self, site: Site, decay: float, step: int) -> float:
        one = self._config
        return decay * decay_multiplier(
            step, self._steps, one.shape, one.start, one.stop, one.first, one.last
        )

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to know."""


class Alpha:
    """AlphaDecay (He et al. 2025): multipliers from the exponents of the last measurement."""

    per_layer = True

    def __init__(self, config: AlphaDecay, roles: frozenset[Role]) -> None:
        self.config, self.roles = config, roles
        self.exponents: dict[str, float] | None = None
        self._multipliers: dict[str, float] = {}

    def measures(self, info: ParameterInfo) -> bool:
        """Whether the parameter is a matrix of its roles, large enough for an exponent."""
        large = len(info.shape) == 2 and min(info.shape) >= self.config.min_eigenvalues
        return large and info.role in self.roles

    def observe(self, exponents: dict[str, float]) -> dict[str, float]:
        """Take new exponents by site label; returns mean, least and greatest multiplier."""
        config = self.config
        self.exponents = exponents
        self._multipliers = alpha_multipliers(
            exponents, config.low, config.high, config.normalize_mean
        )
        values = list(self._multipliers.values()) or [1.0]
        return {
            "multiplier_mean": sum(values) / len(values),
            "multiplier_min": min(values),
            "multiplier_max": max(values),
        }

    def move(self, site: Site, decay: float, step: int) -> float:
        return decay * self._multipliers.get(label(site), 1.0)

    def state(self) -> dict[str, Any]:
        return {"exponents": self.exponents, "multipliers": self._multipliers}

    def restore(self, state: dict[str, Any]) -> None:
        self.exponents, self._multipliers = state["exponents"], state["multipliers"]


class Adaptive:
    """AWD (Ghiasi et al. 2023): λ_t = λ‖∇‖₂/‖w‖₂ of the whole model, λ̄ ← m·λ̄ + (1−m)·λ_t."""

    per_layer = False

    def __init__(self, config: AdaptiveDecay, roles: frozenset[Role]) -> None:
        self.config, self.roles = config, roles
        self.mean = 0.0
        self._began = False

    def observe(self, ratio: float) -> None:
        """Take ‖∇‖₂/‖w‖₂ of this update: the unscaled gradient, before clipping.

        A ratio that is not finite would stay in the mean for ever and is not taken.
        """
        if math.isfinite(ratio):
            self.mean = self.config.memory * self.mean + (1.0 - self.config.memory) * ratio
            self._began = True

    def move(self, site: Site, decay: float, step: int) -> float:
        return decay * self.mean if self._began else decay

    def state(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def restore(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]
        self._began = self.mean > 0


class DecayControl:
    """λ, rate and direction of every site, and the sums of what was applied.

    Raises:
        UsageError: if a policy, coupling or form names what this model lacks, or two exclude
            each other.
    """

    def __init__(self, config: Config, plan: DecayPlan) -> None:
        decay = config.optimizer.weight_decay
        infos = [info for group in plan.groups for info in group.parameters]
        self._peak = config.optimizer.learning_rate
        self._plan = plan
        self.base = {site_of(info): plan.by_name[info.name] for info in infos}
        self._roles = frozenset(info.role for info in infos)
        self.coupling = self._by_role(decay.coupling, "coupling", "lr")
        self.form = self._by_role(decay.form, "form", "decoupled")
        self.policies: list[Policy] = []
        for index, one in enumerate(decay.policies):
            roles = self._named(one.roles, f"policies[{index}].roles")
            if isinstance(one, ScheduleDecay):
                self.policies.append(_Schedule(one, roles, config.train.steps))
            elif isinstance(one, AlphaDecay):
                alpha = Alpha(one, roles)
                if not any(map(alpha.measures, infos)):
                    raise UsageError(
                        f"{KEY}.policies[{index}].min_eigenvalues: no matrix of these roles has "
                        f"{one.min_eigenvalues} eigenvalues; lower it"
                    )
                self.policies.append(alpha)
            elif isinstance(one, AdaptiveDecay):
                self.policies.append(Adaptive(one, roles))
                self.form |= dict.fromkeys(roles, one.form)
            else:
                sites = [site for site in self.base if site[0] in roles]
                rates = self._rates(config, roles)
                self.policies.append(RankController(one, roles, sites, self.base, rates, config))
        self._check(decay.nuclear_every)
        self._nuclear_every = decay.nuclear_every
        self.used: dict[Site, Applied] = {}
        self.exposure = dict.fromkeys(self.base, 0.0)
        self.retention = dict.fromkeys(self.base, 1.0)
        self._step, self._rate = 0, 0.0

    # --- what holds by role -------------------------------------------------------------------

    def _named(self, words: Iterable[str], key: str) -> frozenset[Role]:
        roles: set[Role] = set()
        for word in words:
            here = self._roles.intersection(roles_of(word, f"{KEY}.{key}"))
            if not here:
                raise UsageError(f"{KEY}.{key}: this model has no {word!r}; remove it")
            roles |= here
        return frozenset(roles)

    def _by_role(self, setting: str | Mapping[str, str], key: str, default: str) -> dict[Role, str]:
        if isinstance(setting, str):
            return dict.fromkeys(self._roles, setting)
        found = dict.fromkeys(self._roles, setting.get("default", default))
        # Wide words first, so that narrower ones have the last say.
        words = [word for word in setting if word != "default"]
        for word in sorted(words, key=lambda word: -len(ALIASES.get(word, ()))):
            found |= dict.fromkeys(self._named([word], key), setting[word])
        return found

    def _rates(self, config: Config, roles: frozenset[Role]) -> list[float]:
        """The rate of every update of the run, which some roles share."""
        couplings = {self.coupling[role] for role in roles}
        if len(couplings) > 1:
            raise UsageError(
                f"{KEY}.coupling: rank_target needs one coupling for its roles, not "
                f"{' and '.join(sorted(couplings))}"
            )
        (coupling,) = couplings
        return [
            coupled_rate(coupling, config.learning_rate(step), self._peak)
            for step in range(config.train.steps)
        ]

    def _check(self, nuclear_every: int) -> None:
        adaptive: dict[Role, Policy] = {}
        for policy in self.policies:
            if isinstance(policy, _Schedule):
                continue
            for role in policy.roles:
                if role in adaptive:
                    raise UsageError(
                        f"{KEY}.policies: {role} is moved by two of alpha, awd and rank_target; "
                        "keep one of them (schedules may be added to it)"
                    )
                adaptive[role] = policy
        for pair in (QK, VO):
            forms = {self.form[role] for role in pair if role in self.form}
            if "nuclear" in forms and len(forms) > 1:
                raise UsageError(
                    f"{KEY}.form: nuclear acts on a product: set it for both "
                    f"{' and '.join(pair)} (or for {'qk' if pair is QK else 'vo'})"
                )
        for role, form in self.form.items():
            if form == "nuclear" and role not in QK + VO and self._some(role):
                raise UsageError(
                    f"{KEY}.form: nuclear is for the products of attention, not for {role}; write "
                    "form: {attention: nuclear}"
                )
            if self.coupling[role] == "none":
                most = max(value for site, value in self.base.items() if site[0] is role)
                if most > _MOST_A_STEP:
                    raise UsageError(
                        f"{KEY}.coupling: none takes the share λ of a weight in every update, and "
                        f"{role} has λ = {most:g}; 1e-4 is usual, at most {_MOST_A_STEP:g}"
                    )
        if nuclear_every > 1 and "nuclear" not in self.form.values():
            raise UsageError(f"{KEY}.nuclear_every: no form is nuclear; remove it")

    def _some(self, role: Role) -> bool:
        return any(value > 0 for site, value in self.base.items() if site[0] is role)

    def is_plain(self, role: Role) -> bool:
        """Whether λ of the role is constant, decoupled and at rate η: any AdamW does that."""
        moved = any(role in policy.roles for policy in self.policies)
        return not moved and self.coupling[role] == "lr" and self.form[role] == "decoupled"

    def is_adaptive(self, role: Role) -> bool:
        """Whether λ of the role depends on what is measured while training."""
        return any(role in p.roles for p in self.policies if not isinstance(p, _Schedule))

    @property
    def needs_norms(self) -> bool:
        """Whether `commit` wants ‖∇‖/‖w‖."""
        return any(isinstance(policy, Adaptive) for policy in self.policies)

    @property
    def alpha(self) -> list[Alpha]:
        """Policies that want spectra of weights."""
        return [policy for policy in self.policies if isinstance(policy, Alpha)]

    @property
    def rank_controllers(self) -> list[RankController]:
        """Policies that want measured ranks."""
        return [policy for policy in self.policies if isinstance(policy, RankController)]

    # --- one update -----------------------------------------------------------------------------

    def begin(self, step: int, rate: float) -> None:
        """The coming update: its number, counted from 0, and its learning rate η."""
        self._step, self._rate = step, rate

    @property
    def step(self) -> int:
        """Number of the update that `begin` announced."""
        return self._step

    @property
    def rate(self) -> float:
        """η of that update."""
        return self._rate

    def now(self, site: Site) -> Applied:
        """λ and rate at a site in the coming update, as far as is known before its gradient."""
        decay = self.base[site]
        for policy in self.policies:
            if site[0] in policy.roles:
                decay = policy.move(site, decay, self._step)
        rate = coupled_rate(self.coupling[site[0]], self._rate, self._peak)
        every = self._nuclear_every if self.form[site[0]] == "nuclear" else 1
        return Applied(decay, rate, 0 if self._step % every else every)

    def commit(self, ratio: float | None = None) -> dict[Site, Applied]:
        """Settle what the update takes, and enter it in the books; once an update.

        Args:
            ratio: ‖∇‖₂/‖w‖₂ of the whole model, where `needs_norms`.
        """
        if ratio is not None:
            for policy in self.policies:
                if isinstance(policy, Adaptive):
                    policy.observe(ratio)
        self.used = {site: self.now(site) for site in self.base}
        for site, applied in self.used.items():
            self.exposure[site] += applied.shrink
            self.retention[site] *= 1.0 - applied.shrink
        return self.used

    def in_use(self) -> dict[str, float]:
        """λ of the last update, for the log: by group, or by layer where policies part them."""
        found: dict[str, float] = {}
        for group in self._plan.groups:
            by_layer = any(p.per_layer and group.role in p.roles for p in self.policies)
            for info in group.parameters:
                site = site_of(info)
                applied = self.used.get(site) or self.now(site)
                found[label(site) if by_layer else group.name] = applied.decay
        return found

    def books(self) -> Books:
        """What was done so far at every site."""
        return {
            label(site): Book(
                (self.used.get(site) or self.now(site)).decay,
                self.exposure[site],
                self.retention[site],
            )
            for site in self.base
        }

    # --- saved with the run ---------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run must know (JSON)."""
        return {
            "policies": [policy.state() for policy in self.policies],
            "books": {
                name: [book.decay, book.exposure, book.retention]
                for name, book in self.books().items()
            },
        }

    def restore(self, state: dict[str, Any], same_policies: bool) -> None:
        """Take up a saved state.

        Args:
            same_policies: False for a fork with other policies: they begin anew, the books go on.
        """
        for site in self.base:
            _, self.exposure[site], self.retention[site] = state["books"][label(site)]
        if same_policies:
            for policy, saved in zip(self.policies, state["policies"], strict=True):
                policy.restore(saved)

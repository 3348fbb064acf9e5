"""The origin of a run: new, its own checkpoint, or a checkpoint of another run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pretrain.checkpoint.reader import CHECKPOINTS, Checkpoint, step_of
from pretrain.config.recipe import Config
from pretrain.errors import UsageError
from pretrain.runs.finished import check_finished
from pretrain.runs.folder import check_continues, forked_from, plan_for_resume, resume_point
from pretrain.runs.identity import line_of, read_trunks
from pretrain.runs.loop import refuse_loop
from pretrain.training.faults import read_jumps, write_jumps
from pretrain.training.setup import Setup

JUMPED = "jumped"
"""Key of a checkpoint's state: blocks of samples that are left out."""


@dataclass(frozen=True)
class StartRequest:
    """What a start asks for in addition to its recipe."""

    run: Path
    fork: Path | None = None
    """A checkpoint of another run to begin from."""
    until: int | None = None
    """Stop after this step, with a checkpoint."""
    precision: str = ""
    """The recipe's value of precision; the recipe itself has its meaning on this machine."""


@dataclass(frozen=True)
class Origin:
    """Where this start of a run begins."""

    kind: Literal["new", "resumed", "forked", "imported"]
    """Imported means: from the run's own first checkpoint, with nothing measured so far."""
    checkpoint: Checkpoint | None = None
    """The checkpoint to restore: the newest of the run, or the one from which it is forked."""
    jumps: tuple[int, ...] = ()
    """Blocks of samples that are left out (`pretrain.training.faults.block_of`)."""

    @property
    def step(self) -> int:
        """Updates made so far."""
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def own(self) -> Checkpoint | None:
        """The run's own checkpoint from which it continues."""
        return None if self.kind == "forked" else self.checkpoint

    def trust(self) -> None:
        """Trust the run's own checkpoint, because it was checked before."""
        if self.own is not None:
            self.own.trust()

    def initial_weights(self, built: str) -> str:
        """Hash of the weights with which the run began; a fork has those of its trunk.

        Args:
            built: hash of the model as it was built.
        """
        if self.checkpoint is None:
            return built
        if self.kind == "forked":
            return self.checkpoint.digest
        first: str = self.checkpoint.state["initial_weights"]
        return first

    def trunks(self, run: Path) -> list[str]:
        """Of a fork, the initial weights of its trunk, after those of the trunk's own trunks."""
        if self.kind != "forked" or self.checkpoint is None:
            return read_trunks(run)
        return line_of(
            self.checkpoint.path.parent.parent, self.checkpoint.state.get("initial_weights")
        )

    def saved(self, key: str, default: Any = None) -> Any:
        """A value from the restored checkpoint's state."""
        return self.checkpoint.state.get(key, default) if self.checkpoint else default


def begin(setup: Setup, request: StartRequest) -> tuple[Setup, Origin]:
    """Find where a run begins, and the setup with the decay that applies from there on.

    Raises:
        UsageError: if the folder holds a run of another recipe or origin, or one that is finished
            and cannot do what is asked.
    """
    run, config, until = request.run, setup.config, request.until
    refuse_loop(run)
    own = resume_point(run, config, request.precision)
    if request.fork is not None:
        _check_fork(run, request.fork, own)
    if until is not None and until > config.train.steps:
        raise UsageError(f"--until: {until} is after the last step, {config.train.steps}")
    if own is not None and own.step >= (until or config.train.steps):
        check_finished(run, config, setup.plan, own, until)
    origin = _origin(own, request.fork)
    if origin.checkpoint is not None:
        setup = _with_decay(setup, origin.checkpoint, config.resume.decay if own else "recipe")
        if origin.kind == "forked":
            _check_precision(origin.checkpoint, config.precision, request.precision)
        check_continues(origin.checkpoint, setup.config, setup.task)
        if origin.kind == "forked":
            _check_has_updates(origin.checkpoint, config, until)
    return setup, origin


def _origin(own: Checkpoint | None, fork: Path | None) -> Origin:
    if own is not None:
        return Origin("resumed" if own.step else "imported", own)
    return Origin("forked", Checkpoint(fork)) if fork is not None else Origin("new")


def with_jumps(origin: Origin, run: Path) -> Origin:
    """The origin with its jumps: the checkpoint's, and the run's later ones; a fork keeps its
    trunk's.

    It writes the jumps of a fork to its folder, so only one process may call it.
    """
    jumps: list[int] = origin.saved(JUMPED, [])
    if origin.kind != "forked":
        jumps = sorted({*jumps, *read_jumps(run)})
    elif jumps:
        write_jumps(run, jumps)
    return replace(origin, jumps=tuple(jumps))


def described(fork: Path) -> dict[str, Any]:
    """The record of the checkpoint from which a run is forked."""
    return {"run": str(fork.parent.parent), "step": step_of(fork)}


def _check_fork(run: Path, fork: Path, own: Checkpoint | None) -> None:
    """Refuse a fork from another checkpoint than the one from which the run was forked.

    Args:
        own: the newest checkpoint of the run.
    """
    source = "{run}@{step}".format(**described(fork))
    mend = "remove --fork to continue that run, or choose another --out"
    if fork.resolve().parent == (run / CHECKPOINTS).resolve():
        raise UsageError(f"--fork: {source} belongs to {run} itself, which --out names; {mend}")
    began = own.state.get("initial_weights") if own else None
    if own is not None and began and Checkpoint(fork).digest != began:
        before = forked_from(run)
        origin = "{run}@{step}".format(**before) if before else "other weights"
        raise UsageError(
            f"--fork: {run} is at step {own.step} of a run that began with {origin}, not "
            f"with {source}; {mend}"
        )


def _check_has_updates(trunk: Checkpoint, config: Config, until: int | None) -> None:
    """Refuse a fork that would make no update.

    Raises:
        UsageError: with the step of the trunk's checkpoint and the key to raise.
    """
    key, last = ("train.steps", config.train.steps) if until is None else ("--until", until)
    if trunk.step >= last:
        source = "{run}@{step}".format(**described(trunk.path))
        raise UsageError(
            f"{key}: {last} leaves nothing to train for a fork of {source}, whose checkpoint has "
            f"step {trunk.step}; set {key} above {trunk.step}"
        )


def _check_precision(trunk: Checkpoint, precision: str, recipe_precision: str) -> None:
    """Refuse to fork into another precision unless the recipe asks for it."""
    before = trunk.config.precision
    if recipe_precision == "auto" and before not in ("auto", precision):
        raise UsageError(
            f"precision: auto is {precision} on this machine, but {trunk.path} was trained in "
            f"{before}; set precision={before}, or precision={precision} if you want the change"
        )


def _with_decay(setup: Setup, start: Checkpoint, policy: str) -> Setup:
    """The setup with the decay that applies after a restore, by ``resume.decay``."""
    plan = plan_for_resume(setup.plan, start, setup.config, policy)
    if policy != "checkpoint":
        return replace(setup, plan=plan)
    optimizer = setup.config.optimizer.model_copy(
        update={"weight_decay": start.config.optimizer.weight_decay}
    )
    return replace(
        setup, plan=plan, config=setup.config.model_copy(update={"optimizer": optimizer})
    )

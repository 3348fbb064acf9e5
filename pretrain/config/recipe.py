"""The configuration of a run: one frozen, typed, validated tree from YAML and overrides."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from models.config import GPTConfig
from pretrain.config.explain import explain
from pretrain.config.extension import Code, Foreign, Home, folder_of, run_code, running
from pretrain.config.kinds import FOLDER, KindSection
from pretrain.config.mapping import apply_value_overrides, read_mapping, set_value, value_in
from pretrain.config.run import (
    CheckpointConfig,
    EvaluationConfig,
    FaultsConfig,
    LoggingConfig,
    ProfileConfig,
    RanksConfig,
    ResumeConfig,
    SpeedConfig,
)
from pretrain.config.schedule import in_steps, learning_rate
from pretrain.config.science import (
    DataConfig,
    GridConfig,
    OptimizerConfig,
    TaskConfig,
    TrainConfig,
)
from pretrain.config.section import Section
from pretrain.decay.registry import POLICIES
from pretrain.decay.sites import KEY
from pretrain.errors import UsageError
from pretrain.runs.service import SERVICES
from pretrain.tasks.samples import SAMPLE_TASKS


class Config(Section):
    """Everything that defines a run."""

    seed: int = Field(
        1234, ge=0, description="of the initial weights and of the order of the data, on every grid"
    )
    model: GPTConfig = GPTConfig()
    task: TaskConfig = TaskConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    grid: GridConfig = GridConfig()
    speed: SpeedConfig = SpeedConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="bf16 keeps fp32 master weights; auto: bf16 where it is fast"
    )
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    ranks: RanksConfig = RanksConfig()
    logging: LoggingConfig = LoggingConfig()
    profile: ProfileConfig = ProfileConfig()
    resume: ResumeConfig = ResumeConfig()
    faults: FaultsConfig = FaultsConfig()
    deepspeed: dict[str, Any] = Field({}, description="raw DeepSpeed settings, for experts")
    _folder: Home = PrivateAttr(None)
    """The folder of code files that it names."""

    @field_validator("precision", mode="before")
    @classmethod
    def _has_masters(cls, value: Any) -> Any:
        if value in ("bf16_pure", "bf16-pure", "bf16-true", "bfloat16"):
            raise ValueError(
                f"{value!r} keeps no fp32 master weights, so a step of size learning_rate x decay "
                "is lost in rounding and there is no weight decay at all; use bf16 (with masters)"
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        grid = self.grid
        if grid.pipeline_parallel > 1 and grid.zero_stage > 1:
            raise ValueError(
                f"grid.zero_stage: {grid.zero_stage} cannot be combined with pipeline_parallel "
                f"{grid.pipeline_parallel}; use zero_stage 0 or 1"
            )
        self._check_update()
        if self.precision == "bf16" and grid.zero_stage == 0 and not self.is_flat:
            raise ValueError(
                "grid.zero_stage: 0 in bf16 uses DeepSpeed's unfused optimizer, whose updates "
                "differ from ZeRO 1-3's; use zero_stage 1 (or precision fp32)"
            )
        if self.speed.compile is True and grid.zero_stage == 3:
            raise ValueError(
                "speed.compile: not possible with grid.zero_stage 3, which gathers weights inside "
                "the compiled blocks; use auto, or zero_stage 1 or 2"
            )
        if self.speed.graph is True and not self.is_flat:
            raise ValueError(
                "speed.graph: not possible where DeepSpeed updates the weights (a pipeline, "
                "zero_stage 2 or 3, a raw DeepSpeed key); use auto"
            )
        if grid.pipeline_parallel > self.model.num_layers:
            raise ValueError(
                f"grid.pipeline_parallel: {grid.pipeline_parallel} stages are more than "
                f"model.num_layers {self.model.num_layers}; use fewer stages"
            )
        if (self.task.kind == "images") != bool(self.model.image_size):
            raise ValueError(
                "task.kind: images needs model.dialect vit, and vit needs task.kind images"
            )
        if (self.task.kind == "own") != (self.task.own is not None):
            raise ValueError("task.own: set it exactly if task.kind is own")
        if self.data.attention == "within" and self.task.kind != "text":
            raise ValueError(
                f"data.attention: within needs documents, which task.kind {self.task.kind} does "
                "not have; use across"
            )
        if self.task.kind == "recall" and self.model.context != 2 * self.task.pairs + 1:
            raise ValueError(
                f"model.context: {self.model.context} must be {2 * self.task.pairs + 1} for "
                f"task.pairs {self.task.pairs} (two per pair, and the question)"
            )
        if self.task.kind == "recall" and self.task.symbols < self.task.pairs:
            raise ValueError(
                f"task.symbols: {self.task.symbols} symbols are too few for {self.task.pairs} "
                "different x"
            )
        if grid.sequence_parallel and self.model.context % grid.tensor_parallel:
            raise ValueError(
                f"grid.sequence_parallel: model.context {self.model.context} is not a multiple of "
                f"tensor_parallel {grid.tensor_parallel}"
            )
        return self

    def without_code(self, why: Foreign) -> Config:
        """A copy; values that are put into it can name only code that is loaded already."""
        copy = self.model_copy()
        copy._folder = why
        return copy

    def _check_update(self) -> None:
        if self.speed.update != "flat":
            return
        grid = self.grid
        unfit = {
            f"grid.pipeline_parallel {grid.pipeline_parallel}": grid.pipeline_parallel > 1,
            f"grid.zero_stage {grid.zero_stage}": grid.zero_stage > 1,
            "keys of deepspeed:": bool(self.deepspeed),
        }
        if setting := next((key for key, refused in unfit.items() if refused), ""):
            raise ValueError(
                f"speed.update: flat does not support {setting}; use speed.update auto"
            )

    @property
    def is_flat(self) -> bool:
        """Whether updates are made on flat buffers (`pretrain.engine.flat_update`), without
        DeepSpeed."""
        if self.speed.update != "auto":
            return self.speed.update == "flat"
        grid = self.grid
        return grid.pipeline_parallel == 1 and grid.zero_stage <= 1 and not self.deepspeed

    @property
    def warmup_steps(self) -> int:
        """Number of updates of the linear warm-up."""
        return in_steps(self.optimizer.schedule.warmup, self.train.steps)

    def learning_rate(self, step: int) -> float:
        """Learning rate of update number ``step``, counted from 0."""
        schedule = self.optimizer.schedule
        return learning_rate(
            step,
            self.train.steps,
            self.optimizer.learning_rate,
            schedule.kind,
            self.warmup_steps,
            schedule.final_fraction,
            in_steps(schedule.decay, self.train.steps),
        )

    @property
    def norms_every(self) -> int:
        """Steps between norms (`logging.norms`); 0: never."""
        every = self.logging.norms
        return min(100, max(10, self.train.steps // 20)) if every is None else every

    def interval(self, section: str) -> int:
        """Steps between checkpoints, evaluations or rank measurements."""
        every: int = getattr(self, section).every
        parts = {"checkpoint": 10, "evaluation": 10, "ranks": 20}[section]
        if every:
            return every
        every = max(1, self.train.steps // parts)
        if section == "checkpoint" and self.checkpoint.keep_best and self.checkpoint.keep:
            evaluations = self.interval("evaluation")  # the best is chosen by their losses
            return -(-every // evaluations) * evaluations
        return every


def load_config(
    path: Path, overrides: list[str] | None = None, code: Iterable[Path] | None = None
) -> Config:
    """Read a YAML recipe and apply ``key.path=value`` overrides, each value as YAML.

    Args:
        code: files of code that the command line names. They are run, and so is the code that the
            recipe names, unless the recipe is in a folder that this program wrote
            (`pretrain.config.extension`). None: no code is run.

    Raises:
        UsageError: one line that names the file or key and what to do.
    """
    values = read_mapping(path, "recipe", "sections, such as `model:`")
    plain = deepcopy(values) if overrides else None
    apply_value_overrides(values, overrides or [])
    if code is None:
        return parse_config(values, str(path), None, overrides or (), plain)
    run_code(code)
    config = parse_config(values, str(path), folder_of(path), overrides or (), plain)
    for key, section in entries(config):
        if missing := next(filter(None, (kinds.absent(section) for kinds in _OPEN)), ""):
            raise UsageError(f"{path}: {key}: {missing}")
    return config


_OPEN = (POLICIES, SERVICES, SAMPLE_TASKS)


def entries(config: Config) -> Iterator[tuple[str, KindSection]]:
    """The entries that can be of a user's classes, with their keys."""
    for index, policy in enumerate(config.optimizer.weight_decay.policies):
        yield f"{KEY}.policies[{index}]", policy
    for index, tracker in enumerate(config.logging.trackers):
        yield f"logging.trackers[{index}]", tracker
    if config.task.own is not None:
        yield "task.own", config.task.own


def apply_overrides(config: Config, overrides: list[str]) -> Config:
    """``config`` with ``key.path=value`` overrides.

    Raises:
        UsageError: naming the override.
    """
    values = config.model_dump(mode="json")
    apply_value_overrides(values, overrides)
    return parse_config(values, "override", config._folder)


def with_values(config: Config, values: dict[str, Any], source: str) -> Config:
    """``config`` with other values at dotted keys.

    Raises:
        UsageError: a message that starts with ``source``, for an unknown key or a bad value.
    """
    tree = config.model_dump(mode="json")
    for key, value in values.items():
        set_value(tree, key, value, f"{source}: {key}")
    return parse_config(tree, source, config._folder)


def parse_config(
    values: dict[str, Any],
    source: str = "recipe",
    folder: Home = None,
    overrides: Iterable[str] = (),
    plain: dict[str, Any] | None = None,
) -> Config:
    """Validate a plain mapping.

    Args:
        source: the file, for messages.
        folder: the folder of code files that it names.
        overrides: those of the command line that the mapping contains, for messages.
        plain: the mapping without them, for messages: where it is valid, they are the mistake,
            whichever key of a rule over two keys they set.

    Raises:
        UsageError: the first error, with a suggestion if a key is nearly right.
    """
    try:
        config = Config.model_validate(values, context={FOLDER: folder})
    except ValidationError as error:
        problem = explain(error.errors()[0], Config)
        blamed = _sets(overrides, problem.partition(":")[0])
        if not blamed and plain is not None:
            blamed = _is_valid(plain, folder)
        place = "command line" if blamed else source
        hint = "" if blamed else _hint_of_sweep(values)
        raise UsageError(f"{place}: {problem}{hint}") from None
    config._folder = folder
    return config


_OF_SWEEPS = {"grid", "exposure", "points", "seeds", "baseline", "fork"}
"""Keys of a sweep file beside ``recipe``; of a recipe, ``grid`` is one, but ``recipe`` is none."""


def _hint_of_sweep(values: dict[str, Any]) -> str:
    """A hint if a mapping that is no recipe looks like a sweep."""
    is_sweep = "recipe" in values and values.keys() & _OF_SWEEPS
    return "; the file looks like a sweep, for `pretrain sweep`" if is_sweep else ""


def _is_valid(values: dict[str, Any], folder: Home) -> bool:
    try:
        Config.model_validate(values, context={FOLDER: folder})
    except ValidationError:
        return False
    return True


def _sets(overrides: Iterable[str], key: str) -> bool:
    """Whether an override sets a dotted key, or one in it or around it."""
    names = (override.partition("=")[0] for override in overrides)
    return any(f"{name}.".startswith(f"{key}.") or key.startswith(f"{name}.") for name in names)


def code_of(config: Config) -> list[Code]:
    """The user's code files that a recipe runs, each once."""
    codes = [running(getattr(section, "sha256", "")) for _, section in entries(config)]
    return list({code.sha256: code for code in codes if code}.values())


def value_at(config: Config, key: str) -> Any:
    """The value at a dotted key, as plain data; None if there is none.

    Names that contain dots (``data.weights.my.corpus``) are found, too.
    """
    return value_in(config.model_dump(mode="json"), key)


def dump_config(config: Config) -> str:
    """The whole tree as YAML, defaults included."""
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False)

"""SWEEP.yaml: a recipe, a grid of dotted keys, seeds and a baseline -> a list of runs."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from pretrain.config.explain import cut, explain
from pretrain.config.extension import Foreign, folder_of
from pretrain.config.mapping import number, read_mapping
from pretrain.config.recipe import Config, load_config, with_values
from pretrain.config.section import Section
from pretrain.errors import UsageError
from pretrain.sweep.exposure import exposure_per_decay

Values = dict[str, Any]
"""Dotted keys of a recipe and their values."""


MOST_RUNS = 10_000
"""Largest number of runs of a sweep; more are assumed to be a mistake."""


_LONGEST = 230
"""Bytes of a point's name; a folder's may have 255, with the seed and what is put before it."""


class Range(Section):
    """Evenly spaced values, both ends included."""

    start: float = Field(alias="from")
    stop: float = Field(alias="to")
    count: int = Field(ge=2, le=MOST_RUNS)
    scale: Literal["linear", "log"] = "linear"

    def values(self) -> list[float]:
        """The numbers, rounded to six digits."""
        low, high = self.start, self.stop
        if self.scale == "log":
            if low <= 0 or high <= 0:
                raise ValueError("a log range needs positive ends")
            low, high = math.log(low), math.log(high)
        levels = [low + (high - low) * i / (self.count - 1) for i in range(self.count)]
        return [_round(math.exp(x) if self.scale == "log" else x) for x in levels]


class ForkConfig(Section):
    """One trunk run for each seed, from which every arm continues with its own values."""

    step: int = Field(ge=1, description="last step of the trunk")
    set: Values = Field({}, description="values of the trunk, instead of the recipe's")


class SweepConfig(Section):
    """The keys of a sweep file."""

    recipe: str = Field(description="YAML recipe, relative to the sweep file")
    set: Values = Field({}, description="values that all runs share")
    grid: dict[str, list[Any] | Range] = Field({}, description="keys whose values are combined")
    exposure: dict[str, list[float] | Range] = Field(
        {}, description="λ keys given as Σηλ over the run, combined with the grid"
    )
    points: list[Values] = Field([], description="further points, in addition to the grid")
    seeds: list[int] | int = Field(
        1, description="list, or the number of seeds from the recipe's on"
    )
    baseline: Values | None = Field(None, description="the point that others are compared with")
    fork: ForkConfig | None = None
    processes: int = Field(1, ge=1, description="processes of each run")
    retries: int = Field(1, ge=0, description="how often a failed run is tried again")
    wandb: str = Field("", description="W&B project; the sweep is one group of it")


_KEYS = SweepConfig.model_fields.keys()


@dataclass(frozen=True)
class Point:
    """One setting of the grid."""

    name: str
    given: Values
    """Values as in the sweep file (λ or exposure)."""
    values: Values
    """Values for the recipe (λ)."""


@dataclass(frozen=True)
class SweepRun:
    """One run of the sweep, or a trunk."""

    name: str
    run: Path
    config: Config
    point: Point | None
    """The point; None for a trunk."""
    until: int | None = None
    trunk: SweepRun | None = None

    @property
    def last(self) -> int:
        """The last step."""
        return self.until or self.config.train.steps

    @property
    def steps(self) -> int:
        """Number of steps that the run itself trains, after its trunk."""
        return self.last - (self.trunk.last if self.trunk else 0)

    @property
    def tokens(self) -> int:
        """Number of tokens that the run itself trains on."""
        return self.steps * self.config.train.global_batch * self.config.model.context


@dataclass(frozen=True)
class Sweep:
    """A sweep file, expanded."""

    name: str
    config: SweepConfig
    points: list[Point]
    baseline: Point | None
    tasks: list[SweepRun]

    @property
    def keys(self) -> list[str]:
        """Every key that varies."""
        return list(dict.fromkeys(key for point in self.points for key in point.given))


def load_sweep(path: Path, out: Path | None = None) -> Sweep:
    """Read and expand a sweep file; nothing is written.

    Args:
        out: folder of the runs; default ``runs/NAME``.

    Raises:
        UsageError: one line that names the file, the key and what to do.
    """
    config = _read(path)
    base = load_config(_recipe(path, config), code=[])
    home = folder_of(path)
    if isinstance(home, Foreign):  # a sweep file of others: only the recipe is the user's
        base = base.without_code(home)
    base = with_values(base, config.set, f"{path}: set")
    points = _points(path, config, base)
    baseline = _baseline(path, config, points)
    folder = out or Path("runs") / path.stem
    seeds = config.seeds
    count = seeds if isinstance(seeds, int) else len(seeds)
    if count * len(points) > MOST_RUNS:
        raise UsageError(
            f"{path}: seeds: {count:,} of {len(points):,} points are more than {MOST_RUNS:,} runs"
        )
    if isinstance(seeds, int):
        seeds = [base.seed + index for index in range(seeds)]
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"{path}: seeds: empty, or one occurs twice; give different numbers")
    tasks: list[SweepRun] = []
    for seed in seeds:
        trunk = _trunk(path, config, base, seed, folder)
        tasks += [trunk] if trunk else []
        for point in points:
            name = f"{point.name},seed={seed}" if point.name else f"seed={seed}"
            values = {**point.values, "seed": seed, **_logging(path, config)}
            run = with_values(base, values, f"{path}: {point.name}")
            tasks.append(SweepRun(name, folder / name, run, point, trunk=trunk))
    return Sweep(path.stem, config, points, baseline, tasks)


def _read(path: Path) -> SweepConfig:
    values = read_mapping(path, "sweep", "keys, `recipe:` and `grid:` at least")
    try:
        return SweepConfig.model_validate(values)
    except ValidationError as error:
        hint = ""
        if "recipe" not in values and (values.keys() - _KEYS) & Config.model_fields.keys():
            hint = "; the file looks like a recipe, for `pretrain train`"
        problem = explain(error.errors()[0], SweepConfig)
        raise UsageError(f"{path}: {problem}{hint}") from None


def _recipe(path: Path, config: SweepConfig) -> Path:
    places = path.parent / config.recipe, Path(config.recipe)
    try:
        return next((place for place in places if place.exists()), places[0])
    except OSError:  # a name too long; whoever reads it says so
        return places[0]


def _points(path: Path, config: SweepConfig, base: Config) -> list[Point]:
    axes: dict[str, list[Any]] = {}
    for section in (config.grid, config.exposure):
        for key, listed in section.items():
            if key in axes:
                raise UsageError(f"{path}: {key}: is in grid and in exposure; keep one")
            try:
                several = listed.values() if isinstance(listed, Range) else listed
                axes[key] = [number(value) for value in several]
            except ValueError as error:
                raise UsageError(f"{path}: {key}: {error}") from None
            if not axes[key]:
                raise UsageError(f"{path}: {key}: no values")
    if not axes and not config.points:
        raise UsageError(f"{path}: grid: nothing varies; give keys and their values")
    if math.prod(len(values) for values in axes.values()) > MOST_RUNS:
        raise UsageError(f"{path}: grid: more than {MOST_RUNS:,} points; use fewer values")
    settings = [
        dict(zip(axes, chosen, strict=True)) for chosen in itertools.product(*axes.values())
    ]
    settings = (settings if axes else []) + [
        {key: number(value) for key, value in point.items()} for point in config.points
    ]
    for setting in settings:
        if "seed" in setting:
            raise UsageError(f"{path}: seed: belongs to seeds:, not to the grid")
    order = list(dict.fromkeys([*axes, *(key for setting in settings for key in setting)]))
    settings = [{key: setting[key] for key in order if key in setting} for setting in settings]
    short = short_names(order)
    sums: dict[str, float] = {}
    points: dict[str, Point] = {}
    for setting in settings:
        name = _fitting(",".join(f"{short[key]}={_text(v)}" for key, v in setting.items()))
        values = dict(setting)
        for key in set(setting).intersection(config.exposure):
            fixed = {k: v for k, v in setting.items() if k not in config.exposure}
            group = json.dumps([key, fixed])
            if group not in sums:
                sums[group] = _per_decay(path, config, base, fixed, key)
            values[key] = _round(float(setting[key]) / sums[group])
        with_values(base, values, f"{path}: grid")
        if name in points and points[name].given != setting:
            raise UsageError(
                f"{path}: two points would both be named {name}; make their values differ more"
            )
        points[name] = Point(name, setting, values)
    return list(points.values())


def _per_decay(path: Path, config: SweepConfig, base: Config, values: Values, key: str) -> float:
    """Exposure of a run of these values for each unit of λ at ``key``."""
    source = f"{path}: grid"
    run = with_values(base, values, source)
    with_values(run, {key: 0.0}, f"{path}: exposure")
    return exposure_per_decay(run, key, config.fork.step if config.fork else 0, f"{path}")


def _baseline(path: Path, config: SweepConfig, points: list[Point]) -> Point | None:
    if config.baseline is None:
        return None
    for point in points:
        if point.given == {key: number(value) for key, value in config.baseline.items()}:
            return point
    shown = cut(str(config.baseline))
    raise UsageError(
        f"{path}: baseline: {shown} is not a point of the sweep; the points are "
        f"{'; '.join(point.name for point in points[:6])}{' ...' * (len(points) > 6)}"
    )


def _trunk(
    path: Path, config: SweepConfig, base: Config, seed: int, folder: Path
) -> SweepRun | None:
    if config.fork is None:
        return None
    run = with_values(base, {**config.fork.set, "seed": seed}, f"{path}: fork.set")
    if config.fork.step >= run.train.steps:
        raise UsageError(
            f"{path}: fork.step: {config.fork.step} leaves no steps of "
            f"train.steps={run.train.steps}"
        )
    name = f"trunk,seed={seed}"
    return SweepRun(name, folder / name, run, None, until=config.fork.step)


def _logging(path: Path, config: SweepConfig) -> Values:
    if not config.wandb:
        return {}
    return {"logging.wandb": config.wandb, "logging.wandb_group": path.stem}


def short_names(keys: list[str]) -> dict[str, str]:
    """The shortest endings of the dotted keys that distinguish them."""
    unique = list(dict.fromkeys(keys))
    names = {}
    for key in unique:
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[-count:])
            if sum(other.endswith(f".{name}") or other == name for other in unique) == 1:
                break
        names[key] = name
    return names


def by_numbers(name: str) -> tuple[str | float, ...]:
    """A key for sorting names by the values of their numbers: ``attention=3`` before ``=10``."""
    parts = re.split(r"((?:(?<=[= ])-)?\d+(?:\.\d+)?(?:e[+-]?\d+)?)", name)
    return tuple(float(part) if number % 2 else part for number, part in enumerate(parts))


_LARGEST = 10**300
"""Integers beyond this are not exact as floats."""


def _fitting(name: str) -> str:
    """A name of a folder; of one that no file system takes, the beginning and a hash."""
    data = name.encode()
    if len(data) <= _LONGEST:
        return name
    digest = hashlib.sha256(data).hexdigest()[:8]
    return f"{data[: _LONGEST - 9].decode(errors='ignore')}-{digest}"


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int | float) and not (isinstance(value, int) and abs(value) > _LARGEST):
        return f"{value:g}"
    if isinstance(value, str):
        return re.sub(r"[^\w.+-]", "_", value)
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    kinds = kinds_of(value)
    return re.sub(r"[^\w.+-]", "_", f"{kinds}-{digest[:4]}") if kinds else digest[:8]


def kinds_of(value: Any) -> str:
    """``alpha+schedule`` for a list of policies, ``none`` for an empty one; else nothing."""
    if value == []:
        return "none"
    if isinstance(value, list) and all(
        isinstance(policy, dict) and "kind" in policy for policy in value
    ):
        # Of a user's own file, ``my_file.py:LayerCosine`` without its folder.
        return "+".join(str(policy["kind"]).rpartition("/")[2] for policy in value)
    return ""


def _round(value: float) -> float:
    return float(f"{value:.6g}")

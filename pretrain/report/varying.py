"""The keys in which runs differ, as far as each run records them and they have an effect."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from models.config import PRESETS, GPTConfig
from pretrain.config.compare import differences
from pretrain.config.recipe import Config
from pretrain.report.runs import RunData
from pretrain.runs.loop import NOT_RECORDED, flat

NO_EFFECT = "–"
"""What stands for a value that another key makes meaningless."""
_MEANING: dict[str, Callable[[Config], Any]] = {
    "model.num_key_value_heads": lambda config: config.model.key_value_heads,
    "model.head_dim": lambda config: config.model.head_size,
    "model.ffn_hidden_size": lambda config: config.model.ffn_size,
}
"""Keys whose 0 means a number that follows from other keys."""


def _rotates(config: Config) -> bool:
    return config.model.position == "rotary"


def _scales(config: Config) -> bool:
    return _rotates(config) and config.model.rotary_factor != 1


def _has_form(form: str) -> Callable[[Config], bool]:
    def has(config: Config) -> bool:
        forms = config.optimizer.weight_decay.form
        return form in (forms.values() if isinstance(forms, dict) else (forms,))

    return has


_NEEDS: dict[str, Callable[[Config], bool]] = {
    "model.rotary_fraction": _rotates,
    "model.rotary_base": _rotates,
    "model.rotary_factor": _rotates,
    "model.rotary_old_context": _scales,
    "model.rotary_low": _scales,
    "model.rotary_high": _scales,
    "model.init_std": lambda config: config.model.initialization == "normal",
    "model.patch_size": lambda config: bool(config.model.image_size),
    "model.image_channels": lambda config: bool(config.model.image_size),
    "optimizer.beta1": lambda config: config.optimizer.name != "sgd",
    "optimizer.beta2": lambda config: config.optimizer.name != "sgd",
    "optimizer.epsilon": lambda config: config.optimizer.name in ("adamw", "muon"),
    "optimizer.momentum": lambda config: config.optimizer.name in ("sgd", "muon"),
    "optimizer.schedule.final_fraction": lambda config: (
        config.optimizer.schedule.kind != "constant"
    ),
    "optimizer.schedule.decay": lambda config: config.optimizer.schedule.kind == "wsd",
    "optimizer.weight_decay.adadecay_slope": _has_form("adadecay"),
    "optimizer.weight_decay.nuclear_every": _has_form("nuclear"),
    "task.pairs": lambda config: config.task.kind == "recall",
    "task.symbols": lambda config: config.task.kind == "recall",
    "task.random_labels": lambda config: config.task.kind == "recall",
    "task.source": lambda config: config.task.kind == "images",
    "task.path": lambda config: config.task.kind == "images",
    "task.augment": lambda config: config.task.kind == "images",
}
"""When a key has an effect; the others always have."""


def meant(run: RunData, key: str) -> Any:
    """What the value at a key means in a run: a number that follows, `NO_EFFECT` or
    `NOT_RECORDED`."""
    if not run.records(key):
        return NOT_RECORDED
    if key in _NEEDS and not _NEEDS[key](run.config):
        return NO_EFFECT
    return _MEANING[key](run.config) if key in _MEANING else run.value_at(key)


def varying(runs: Sequence[RunData], sections: Sequence[str]) -> list[str]:
    """The keys of these sections that distinguish the runs that record them, in the order of a
    recipe.

    A key that has no effect in all runs but some that agree is left out, as is one that only
    follows from the dialect.
    """
    first_of_kind = {run.recorded: run for run in reversed(runs)}.values()
    keys = {
        key
        for first in first_of_kind
        for run in runs
        for key in differences(first.config, run.config, tuple(sections))
        if first.records(key) and run.records(key)
    }
    told = {key for key in keys if _differs(runs, key)}
    if "model.dialect" in told:
        told -= {key for key in told if _follows_from_dialect(runs, key)}
    return in_order(told, runs[0].config)


def _differs(runs: Sequence[RunData], key: str) -> bool:
    values = [value for run in runs if (value := meant(run, key)) not in (NO_EFFECT, NOT_RECORDED)]
    return any(value != values[0] for value in values)


def _follows_from_dialect(runs: Sequence[RunData], key: str) -> bool:
    """Whether every run has, at a key of the model, what its dialect sets."""
    section, _, name = key.rpartition(".")
    knowing = [run for run in runs if run.records(key)]
    if section != "model" or name == "dialect":
        return False
    if not all(run.records("model.dialect") for run in knowing):
        return False
    if not any(name in preset for preset in PRESETS.values()):
        return False
    default = GPTConfig.model_fields[name].default
    return all(
        run.value_at(key) == PRESETS[run.config.model.dialect.value].get(name, default)
        for run in knowing
    )


def in_order(keys: Iterable[str], config: Config) -> list[str]:
    """Keys in the order of a recipe."""
    places = {key: place for place, key in enumerate(flat(config.model_dump(mode="json")))}
    return sorted(keys, key=lambda key: (places.get(key, len(places)), key))

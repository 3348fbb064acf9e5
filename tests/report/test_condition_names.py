"""Names of conditions: only what tells them apart, at a length that a legend can show."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.config.recipe import Config, parse_config, value_at
from pretrain.report.findings import headline
from pretrain.report.load import load_study
from pretrain.report.varying import _MEANING, _NEEDS
from tests.fake_runs import recipe, write_run, write_study

DECAY = "optimizer__weight_decay__attention"


def names(folder: Path, *recipes: dict[str, Any]) -> list[str]:
    """The names of the conditions of runs with these keys, in the order of the runs."""
    for number, changes in enumerate(recipes):
        write_run(folder / f"{number}", recipe(**changes), np.random.default_rng(number))
    study = load_study([folder])
    found = {run.path.name: one.name for one in study.conditions for run in one.runs}
    assert len({one.name for one in study.conditions}) == len(study.conditions)
    return [found[f"{number}"] for number in range(len(recipes))]


LLAMA = {"model__dialect": "llama"}
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "heads by default": ({"model__num_key_value_heads": 0}, {"model__num_key_value_heads": 4}),
    "head width by default": ({"model__head_dim": 0}, {"model__head_dim": 8}),
    "the MLP's width by default": (
        {"model__ffn_hidden_size": 0}, {"model__ffn_hidden_size": 128}),
    "a rotary base without rotation": (
        {"model__position": "learned"}, {"model__position": "learned", "model__rotary_base": 5e5}),
    "a slope of another form": ({}, {"optimizer__weight_decay__adadecay_slope": 9.0}),
    "a phase of another schedule": ({}, {"optimizer__schedule": {"decay": 0.4}}),
    "an end of a constant rate": (
        {"optimizer__schedule": {"kind": "constant"}},
        {"optimizer__schedule": {"kind": "constant", "final_fraction": 0.5}}),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_what_makes_no_difference_is_no_condition(case: str, tmp_path: Path) -> None:
    shape = {"model__hidden_size": 32, "model__num_attention_heads": 4}
    first, second = ({**shape, **changes, "seed": seed} for seed, changes in enumerate(SAME[case]))
    assert names(tmp_path, first, second) == ["all runs", "all runs"]


APART: list[tuple[dict[str, Any], dict[str, Any], tuple[str, str]]] = [
    ({}, LLAMA, ("dialect = gpt2", "dialect = llama")),
    ({**LLAMA, "model__rotary_base": 1e4}, {**LLAMA, "model__rotary_base": 5e5},
     ("rotary_base = 1e+04", "rotary_base = 5e+05")),
    ({"model__position": "learned"}, {"model__position": "rotary", "model__rotary_base": 5e5},
     ("position = learned", "position = rotary")),
    ({}, {**LLAMA, "model__norm": "layernorm"}, ("norm", "norm")),
    ({"model__num_key_value_heads": 0}, {"model__num_key_value_heads": 2},
     ("num_key_value_heads = 4", "num_key_value_heads = 2")),
    ({"optimizer__name": "sgd"}, {"optimizer__name": "adamw", "optimizer__beta1": 0.8},
     ("name = sgd", "name = adamw")),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other", "wanted"), APART)
def test_what_makes_a_difference_is_named_once(
    one: dict[str, Any], other: dict[str, Any], wanted: tuple[str, str], tmp_path: Path
) -> None:
    shape = {"model__hidden_size": 32, "model__num_attention_heads": 4}
    found = names(tmp_path, {**shape, **one}, {**shape, **other})
    if "norm" in wanted:  # the dialect does not say it any more
        assert found[0] != found[1]
        return
    assert tuple(found) == wanted


def test_a_long_name_is_cut_and_stays_the_only_one(tmp_path: Path) -> None:
    many: list[dict[str, Any]] = [
        {DECAY: decay, "train__global_batch": 2 * number, "optimizer__learning_rate": number / 7e3,
         "optimizer__beta1": 0.5 + number / 20, "optimizer__beta2": 0.9 + number / 200,
         "optimizer__gradient_clipping": number / 3, "optimizer__epsilon": number * 1e-9,
         "model__norm_epsilon": number * 1e-6, "data__weights": {"a" * number: 1.0, "b": 2.0}}
        for number, decay in enumerate((0.25, 0.5, 0.75, 0.75), 1)
    ]  # fmt: skip
    found = names(tmp_path, *many)
    for name, changes in zip(found, many, strict=True):
        assert f"attention = {changes[DECAY]:g}" in name and "and " in name
        assert len(name) < 100


def test_a_cut_name_keeps_what_tells_conditions_apart(tmp_path: Path) -> None:
    """Many keys of two values, and a late one that alone differs in every condition."""
    first = ("model__dialect", "model__tied_head", "model__activation", "model__norm",
             "precision", "train__z_loss", "optimizer__beta1", "optimizer__beta2",
             "optimizer__epsilon", "train__global_batch")  # fmt: skip
    values = (("gpt2", "llama"), (True, False), ("gelu", "gelu_tanh"), ("layernorm", "rmsnorm"),
              ("fp32", "bf16"), (0.0, 1e-4), (0.85, 0.87), (0.955, 0.965), (1e-8, 1e-7),
              (8, 16))  # fmt: skip
    recipes = [
        {key: pair[number % 2] for key, pair in zip(first, values, strict=True)}
        | {"optimizer__gradient_clipping": number + 1.0}
        for number in range(6)
    ]
    found = names(tmp_path, *recipes)
    for number, name in enumerate(found):
        assert len(name) <= 90 and f"gradient_clipping = {number + 1}" in name
        assert " more" in name and "(" not in name


def test_every_key_of_the_tables_is_a_recipe_s() -> None:
    config: Config = parse_config(recipe())
    for key in itertools.chain(_NEEDS, _MEANING):
        assert value_at(config, key) is not None or key in ("task.path",), key


def test_an_exposure_has_the_name_of_the_folder(tmp_path: Path) -> None:
    """The legend and the folders say 0.5, not the λ that gives it."""
    folder = write_study(tmp_path / "runs", decays=(0.0, 11.3636, 22.7273), seeds=(1, 2))
    plan = json.loads((folder / "sweep.json").read_text())
    key = "optimizer.weight_decay.attention"
    exposures = {"0": 0.0, "11.3636": 0.5, "22.7273": 1.0}
    for name in plan["runs"]:
        given = exposures[name.split("=")[1].split(",")[0]]
        plan["runs"][name] = {"point": "", "given": {key: given}}
    (folder / "sweep.json").write_text(json.dumps({**plan, "exposure": [key]}))
    study = load_study([folder])
    assert [one.name for one in study.conditions] == [
        f"exposure of attention = {value}" for value in ("0", "0.5", "1")
    ]
    assert headline(study) == "Exposure of attention: 0, 0.5 and 1 compared"
    alone = write_run(tmp_path / "alone", recipe(seed=1, optimizer__weight_decay__attention=3.0),
                      np.random.default_rng(0))  # fmt: skip
    mixed = load_study([folder, alone])
    assert [one.name for one in mixed.conditions] == [
        f"attention = {value}" for value in ("0", "3", "11.36", "22.73")
    ]

"""Every number of a recipe is finite: an infinite one trains on nothing and ends as done."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from models.config import GPTConfig
from pretrain.config.recipe import Config, parse_config
from pretrain.config.science import DataConfig
from pretrain.errors import UsageError


def float_keys(section: type[BaseModel], path: str = "") -> Iterator[str]:
    """Dotted names of the fields that hold a float, sections inside sections too."""
    for name, field in section.model_fields.items():
        kinds = get_args(field.annotation) or (field.annotation,)
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from float_keys(kind, f"{path}{name}.")
            elif kind is float:
                yield f"{path}{name}"


KEYS = sorted({*float_keys(Config)})


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("key", KEYS)
def test_a_recipe_has_finite_numbers(recipe: dict[str, Any], key: str, value: float) -> None:
    *above, last = key.split(".")
    section: Any = recipe
    for part in above:
        section = section.setdefault(part, {})
    section[last] = value
    with pytest.raises(UsageError, match=last):
        parse_config(recipe)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_weights_of_subsets_are_finite(value: float) -> None:
    with pytest.raises(ValidationError):
        DataConfig.model_validate({"path": "x", "weights": {"base": value, "odd": 1}})


def test_every_float_is_found() -> None:
    assert {"optimizer.learning_rate", "optimizer.weight_decay.attention"} <= set(KEYS)
    assert len(KEYS) > 15 and GPTConfig.model_config.get("allow_inf_nan") is False

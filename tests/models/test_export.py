"""What is not exported: a model that no class of `transformers` computes."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from models.config import GPTConfig
from models.export import _WRITTEN, class_of
from models.roles import ModelError
from tests.tools import DIALECTS


class Later(GPTConfig):
    """A model with a setting that was added after the export was written."""

    norm_place: Literal["before", "after"] = "before"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_setting_that_the_export_does_not_know_is_refused(dialect: str) -> None:
    """Otherwise a new switch would be exported as the model without it."""
    values: dict[str, Any] = {**DIALECTS[dialect], "vocabulary_size": 300}
    assert class_of(Later(**values)) == class_of(GPTConfig(**values)) == dialect
    with pytest.raises(ModelError, match=r"model\.norm_place after"):
        class_of(Later(**values, norm_place="after"))


def test_every_setting_that_the_export_knows_exists() -> None:
    assert GPTConfig.model_fields.keys() >= _WRITTEN

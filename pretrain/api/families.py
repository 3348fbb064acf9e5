"""A family of models, as a caller names or describes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from models.families import EXAMPLE, Family, family_of, known_families
from models.live import config_of
from models.roles import ModelError
from pretrain.config.mapping import read_mapping

Described = Mapping[str, Any] | str | Path | Family | None
"""Keys of models/families.yaml, a file of them, the name of a known family, or nothing."""


def described(family: Described, model: nn.Module) -> Family:
    """The family that is meant, or that of the model's config.

    Raises:
        ModelError: if it is not known, with ten lines that describe one.
    """
    if isinstance(family, Family):
        return family
    if isinstance(family, Mapping):
        return family_of(dict(family), "family")
    known = known_families()
    if isinstance(family, Path) or (family is not None and family not in known):
        values = read_mapping(Path(family), "family", f"keys, such as: {EXAMPLE}")
        return family_of(values, str(family))
    kind = family or str(config_of(model).get("model_type", ""))
    if kind not in known:
        what = f"model_type {kind}" if kind else "a model without a config.model_type"
        raise ModelError(
            f"{type(model).__name__}: {what} belongs to no known family; describe it with family="
            f"{{...}} or a YAML file, with lines such as: {EXAMPLE}"
        )
    return known[kind]

"""The base of every section of a recipe."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

_NUMBERS = (int, float, int | float, float | None, int | float | None)


class Section(BaseModel):
    """Base of every section: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_numbers(cls, values: Any) -> Any:
        """Refuse `true`, which would count as 1, and numbers that are too large for a float."""
        for key, field in cls.model_fields.items():
            value = values.get(key) if isinstance(values, dict) else None
            if isinstance(value, bool) and field.annotation in _NUMBERS:
                raise ValueError(f"{key}: must be a number, got {str(value).lower()}")
            if isinstance(value, int) and abs(value) >= 1 << 63:
                raise ValueError(f"{key}: a number of {value.bit_length()} bits is too large")
        return values

"""What a Hugging Face model says about beginning, ending and padding texts.

No logit depends on it, so nothing here reads it; an export writes it again as it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.roles import ModelError
from models.tensor_files import read_json

GENERATION_CONFIG = "generation_config.json"
_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")


def generation_of(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The ids in ``config.json`` and all of ``generation_config.json``, to be kept.

    A key that is missing stays so: the class in `transformers` then has its own value.

    Args:
        folder: of the model.
        config: its ``config.json``.

    Returns:
        ``{"config": ids by key, "generation_config": the other file's values or None}``.

    Raises:
        ModelError: naming a key that is no token id, or a file that is damaged.
    """
    ids = {key: value for key, value in config.items() if _is_id_key(key)}
    file = folder / GENERATION_CONFIG
    others = read_json(file) if file.exists() else None
    for name, values in (("config.json", ids), (GENERATION_CONFIG, others or {})):
        for key, value in values.items():
            if key.endswith("_token_id") and not _is_id(value):
                raise ModelError(
                    f"{folder / name}: {key} is {str(value)[:80]!r}, not a token id, a list of "
                    "them or null"
                )
    return {"config": ids, "generation_config": others}


def _is_id_key(key: str) -> bool:
    return key.endswith("_token_id") or key in _LISTS


def _is_id(value: Any) -> bool:
    if isinstance(value, list):
        return all(type(one) is int for one in value)
    return value is None or type(value) is int


def ends_with(generation: dict[str, Any], token: int) -> bool:
    """Whether a model's texts end with a token, by either file; one that names no end agrees."""
    both = (generation["generation_config"] or {}, generation["config"])
    found = [values["eos_token_id"] for values in both if values.get("eos_token_id") is not None]
    return all(token in one if isinstance(one, list) else token == one for one in found)

"""The special tokens of a Hugging Face model for beginning, ending and padding texts.

No logit depends on them, so they are not interpreted here; an export writes them again unchanged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.roles import ModelError
from models.tensor_files import read_json

GENERATION_CONFIG = "generation_config.json"
_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")


def generation_of(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The token ids in ``config.json`` and all of ``generation_config.json``.

    A missing key stays missing: the class in `transformers` then uses its own value.

    Args:
        folder: the model's folder.
        config: its ``config.json``.

    Returns:
        ``{"config": ids by key, "generation_config": the other file's values or None}``.

    Raises:
        ModelError: naming a key that is not a token id, or a damaged file.
    """
    ids = {key: value for key, value in config.items() if _is_id_key(key)}
    file = folder / GENERATION_CONFIG
    settings = read_json(file) if file.exists() else None
    for name, values in (("config.json", ids), (GENERATION_CONFIG, settings or {})):
        for key, value in values.items():
            if key.endswith("_token_id") and not _is_id(value):
                raise ModelError(
                    f"{folder / name}: {key} is {str(value)[:80]!r}, not a token id, a list of "
                    "them or null"
                )
    return {"config": ids, "generation_config": settings}


def _is_id_key(key: str) -> bool:
    return key.endswith("_token_id") or key in _LISTS


def _is_id(value: Any) -> bool:
    if isinstance(value, list):
        return all(type(item) is int for item in value)
    return value is None or type(value) is int


def ends_with(generation: dict[str, Any], token: int) -> bool:
    """Whether a model's texts end with ``token`` by either file; a file without an end agrees."""
    both = (generation["generation_config"] or {}, generation["config"])
    ends = [values["eos_token_id"] for values in both if values.get("eos_token_id") is not None]
    return all(token in end if isinstance(end, list) else token == end for end in ends)

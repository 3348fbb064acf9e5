"""The tokenizer in a model's folder, with the tokens that `transformers` and lm-eval give a model.

They keep the tokens that the file puts around a text, and they read the text of a special token as
that token unless ``tokenizer_config.json`` says ``split_special_tokens``. `tokenizer.json` says all
that is needed, so no code of a model's authors and no pickled file is read.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.files import read_json, read_tokenizer
from data_pipeline.json_tokenizer import ask_library
from data_pipeline.records import DataError

_FILES = ("tokenizer.json", "tokenizer.model")


class OwnTokenizer:
    """The ``tokenizer.json`` of a model's folder."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        """
        Args:
            config: the model's ``config.json``.

        Raises:
            DataError: if there is no such file, or no token that begins texts.
        """
        import tokenizers

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise DataError(
                f"{folder}: has no tokenizer.json (transformers writes one: "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER))"
            )
        wrong = f"{path}: not a Hugging Face tokenizer.json"
        text = read_tokenizer(path)
        self._made = ask_library(lambda: tokenizers.Tokenizer.from_str(text.decode()), wrong)
        self._made.no_truncation()
        self._made.no_padding()
        settings_file = folder / "tokenizer_config.json"
        settings = read_json(settings_file) if settings_file.is_file() else {}
        if not isinstance(settings, dict):
            raise DataError(f"{settings_file}: damaged (not a mapping)")
        named = {key: _name(value) for key, value in settings.items() if key.endswith("_token")}
        known = [name for name in named.values() if name and self._id(name) is not None]
        self._made.add_special_tokens(list(dict.fromkeys(known)))
        self._made.encode_special_tokens = bool(settings.get("split_special_tokens", False))
        self.prefix = self._prefix(folder, named, config)
        """The token before the first one of a text, as in lm-eval."""

    def _id(self, name: str) -> int | None:
        token = self._made.token_to_id(name)
        return None if token is None else int(token)

    def _prefix(self, folder: Path, named: dict[str, str], config: dict[str, Any]) -> int:
        for key in ("bos_token", "eos_token"):
            token = self._id(named[key]) if named.get(key) else None
            if token is None:
                token = config.get(f"{key}_id")
            if isinstance(token, list) and token:
                token = token[0]
            if isinstance(token, int):
                return token
        raise DataError(
            f"{folder}: neither tokenizer_config.json nor config.json names a token that begins or "
            "ends texts (bos_token, eos_token)"
        )

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, with those that the file puts around it."""
        encoded = ask_library(lambda: self._made.encode_batch(texts), "tokenizer.json")
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encoded]


def _name(value: Any) -> str:
    """The text of a special token, which may be described by an object."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else ""


def hashes_of(folder: Path) -> list[str]:
    """SHA-256 of the tokenizers in a folder."""
    present = [folder / name for name in _FILES if (folder / name).is_file()]
    return [hashlib.sha256(read_tokenizer(path)).hexdigest() for path in present]

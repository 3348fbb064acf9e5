"""Uses a Hugging Face ``tokenizer.json`` for whole documents.

Such a file may have settings that suit a model's inputs but not its training text: truncation,
padding, dropout of merges, tokens around every text. The settings that are switched off are
reported.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_pipeline.files import read_tokenizer
from data_pipeline.records import ChoiceError, DataError

_EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
_LARGEST = 2**31 - 2
"""Largest id: ids are stored as int32 at most, and the vocabulary size is one more."""
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class SpecialTokens:
    """How special tokens other than the end of a document are handled."""

    add: bool = False
    """Put the tokens of the file's post-processor around every document."""
    parse: bool = False
    """Turn the text of a special token inside a document into that token."""


NO_SPECIAL_TOKENS = SpecialTokens()


class HuggingFaceTokenizer:
    """A ``tokenizer.json``."""

    def __init__(
        self, path: Path, eod_token: str | None = None, special: SpecialTokens = NO_SPECIAL_TOKENS
    ) -> None:
        # Work is divided among processes; the library's own threads would oversubscribe the cores.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import tokenizers

        self._path, self._special = path, special
        self._data = read_tokenizer(path)
        wrong = f"{path}: not a Hugging Face tokenizer.json"
        self._tree: dict[str, Any] = ask_library(lambda: json.loads(self._data), wrong)
        if not _merges_fit(self._tree):
            raise DataError(f"{wrong} (its merges do not begin with continuing_subword_prefix)")
        self._tokenizer = ask_library(
            lambda: tokenizers.Tokenizer.from_str(self._data.decode()), wrong
        )
        names = (eod_token,) if eod_token else _EOD_NAMES
        tokens = [self._tokenizer.token_to_id(name) for name in names]
        eods = [token for token in tokens if token is not None]
        if not eods:
            raise ChoiceError(
                f"{path}: no end-of-document token among {', '.join(names)}; name it with "
                "--eod-token"
            )
        self._eod = int(eods[0])
        largest = max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        if largest > _LARGEST:
            raise DataError(f"{path}: has token {largest}; only ids up to {_LARGEST} can be stored")
        self._size = int(largest) + 1
        self.notes = self._switch_off()
        self._before, self._after = self._around()
        self._tokenizer.encode_special_tokens = not special.parse

    def _switch_off(self) -> list[str]:
        """Switch off what would cut, lengthen or change documents, and return what that was."""
        off = []
        if self._tokenizer.truncation is not None:
            off.append(f"truncation to {self._tokenizer.truncation['max_length']} tokens")
            self._tokenizer.no_truncation()
        if self._tokenizer.padding is not None:
            off.append("padding")
            self._tokenizer.no_padding()
        if getattr(self._tokenizer.model, "dropout", None):
            off.append(f"dropout of merges ({self._tokenizer.model.dropout:g})")
            self._tokenizer.model.dropout = None
        return [f"switched off: {', '.join(off)}; documents are encoded whole"] if off else []

    def _around(self) -> tuple[list[int], list[int]]:
        """Tokens that are put before and after every document."""
        if not self._tokenizer.num_special_tokens_to_add(False):
            return [], []
        before, after = self._template()
        names = " … ".join(
            " ".join(self._name(token) for token in part) for part in (before, after)
        )
        kept = "added to every document" if self._special.add else "left out (--add-special-tokens)"
        self.notes.append(f"tokens of the post-processor around a text, {names.strip()}: {kept}")
        return (before, after) if self._special.add else ([], [])

    def _template(self) -> tuple[list[int], list[int]]:
        for probe in ("a", "0", " ", self.eod_name):
            try:
                bare, whole = (
                    self._tokenizer.encode(probe, add_special_tokens=add).ids
                    for add in (False, True)
                )
            except Exception:  # the library raises plain Exception if a token is missing
                continue
            starts = [
                index for index in range(len(whole)) if whole[index : index + len(bare)] == bare
            ]
            if bare and starts:
                return whole[: starts[0]], whole[starts[0] + len(bare) :]
        raise DataError(f"{self._path}: cannot find out what its post-processor puts around a text")

    def as_used(self) -> str:
        """The text of a ``tokenizer.json`` that encodes any text in the same way as documents."""
        if not self.notes:
            return self._data.decode()
        tree = {**self._tree, "truncation": None, "padding": None}
        if "dropout" in tree["model"]:
            tree["model"] = {**tree["model"], "dropout": None}
        if not self._special.add and self._tokenizer.num_special_tokens_to_add(False):
            tree["post_processor"] = None
        return json.dumps(tree, ensure_ascii=False)

    def _name(self, token: int) -> str:
        return str(self._tokenizer.id_to_token(token))

    @property
    def vocabulary_size(self) -> int:
        """Largest id of a token, added ones included, plus 1; ids may have gaps."""
        return self._size

    @property
    def eod(self) -> int:
        """The end-of-document token."""
        return self._eod

    @property
    def eod_name(self) -> str:
        """Its text."""
        return self._name(self._eod)

    @cached_property
    def unknown(self) -> int | None:
        """The unknown token, if there is one."""
        model = self._tree.get("model") or {}
        if model.get("unk_id") is not None:
            return int(model["unk_id"])
        token = self._tokenizer.token_to_id(model["unk_token"]) if model.get("unk_token") else None
        return None if token is None else int(token)

    @property
    def sha256(self) -> str:
        """Hash of the file."""
        return hashlib.sha256(self._data).hexdigest()

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, int32.

        Raises:
            DataError: with a text that the tokenizer cannot encode.
        """
        add = self._special.add
        try:
            encoded = self._tokenizer.encode_batch(texts, add_special_tokens=add)
        except BaseException as error:
            _reraise_if_ours(error)
            self._name_culprit(texts)
            raise DataError(f"{self._path}: {_reason(error)}") from None
        ids = [np.array(encoding.ids, dtype=np.int32) for encoding in encoded]
        if self._after[-1:] == [self._eod]:
            return [tokens[:-1] for tokens in ids]  # the caller adds the end-of-document token
        return ids

    def _name_culprit(self, texts: list[str]) -> None:
        for text in texts:
            ask_library(
                lambda: self._tokenizer.encode(text),  # noqa: B023 - called at once
                f"{self._path}: cannot encode {text[:60]!r}",
            )

    def spells(self, ids: np.ndarray, text: bytes) -> bool:
        """Whether ids are quickly seen to decode to a text: never, its decoder says."""
        return False

    def decode(self, ids: list[int] | np.ndarray) -> str:
        """Text of some token ids."""
        listed = np.asarray(ids, dtype=np.int64).tolist()
        wrong = f"{self._path}: cannot decode"
        return str(
            ask_library(lambda: self._tokenizer.decode(listed, skip_special_tokens=False), wrong)
        )

    def inside(self, ids: np.ndarray) -> np.ndarray:
        """The tokens of a document's text, without added ones."""
        after = len(self._after) - (self._after[-1:] == [self._eod])
        return ids[len(self._before) : len(ids) - after]

    def special_texts(self, text: str) -> int:
        """How often the text of a special token occurs in a text."""
        starts, pattern = self._special_pattern
        if not any(start in text for start in starts):
            return 0
        return len(pattern.findall(text))

    @cached_property
    def _special_pattern(self) -> tuple[set[str], re.Pattern[str]]:
        added = self._tree.get("added_tokens") or []
        names = [token["content"] for token in added if token.get("special") and token["content"]]
        longest_first = sorted(names, key=len, reverse=True)
        # Without names, a pattern that never matches.
        pattern = "|".join(re.escape(name) for name in longest_first) or r"(?!)"
        return {name[:2] for name in names}, re.compile(pattern)

    def causes(self) -> list[str]:
        """Parts of the file that may change a text."""
        parts = [f"normalizer {kind}" for kind in _kinds(self._tree.get("normalizer"))]
        parts += [f"pre_tokenizer {kind}" for kind in _kinds(self._tree.get("pre_tokenizer"))]
        model, decoder = self._tree.get("model") or {}, _kinds(self._tree.get("decoder"))
        parts += [f"decoder {kind}" for kind in decoder] or ["no decoder"]
        if "ByteLevel" not in decoder and not model.get("byte_fallback"):
            parts.append("no byte fallback")
        return parts


def _merges_fit(tree: Any) -> bool:
    """Whether the second parts of merges have the prefix of continued words.

    The library aborts the process if they are shorter than the prefix.
    """
    model = tree.get("model") if isinstance(tree, dict) else None
    prefix = model.get("continuing_subword_prefix") if isinstance(model, dict) else None
    merges = model.get("merges") if isinstance(model, dict) else None
    if not isinstance(prefix, str) or not isinstance(merges, list):
        return True
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return all(merge and str(merge[-1]).startswith(prefix) for merge in pairs)


def check_ids(vocabulary: Any, wrong: str) -> None:
    """Check that a vocabulary has texts with ids of their own, which can be stored.

    The library aborts the process, or panics, on some others.

    Raises:
        DataError: ``wrong`` and what is wrong.
    """
    if not isinstance(vocabulary, dict):
        raise DataError(f"{wrong} (its ids are not by text)")
    ids = list(vocabulary.values())
    if not all(type(number) is int and 0 <= number <= _LARGEST for number in ids):
        raise DataError(f"{wrong} (its ids are not integers from 0 to {_LARGEST})")
    if len(set(ids)) < len(ids):
        raise DataError(f"{wrong} (two texts have the same id)")


def _kinds(part: Any) -> list[str]:
    """Types of the components in a part of the file; sequences are flattened."""
    if not isinstance(part, dict):
        return []
    inner = next(
        (part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part), None
    )
    if isinstance(inner, list):
        return [kind for component in inner for kind in _kinds(component)]
    return [str(part.get("type"))]


def ask_library(call: Callable[[], _Result], wrong: str) -> _Result:
    """Call the library and turn its exceptions into one line.

    Raises:
        DataError: ``wrong`` and the library's reason.
    """
    try:
        return call()
    except BaseException as error:
        _reraise_if_ours(error)
        raise DataError(f"{wrong} ({_reason(error)})") from None


def _reraise_if_ours(error: BaseException) -> None:
    """The reason in an exception; the library raises plain Exception, or BaseException on a
    panic."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__

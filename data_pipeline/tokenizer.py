"""Tokenizers: SentencePiece models trained here, or existing ones; lossless by construction."""

from __future__ import annotations

import hashlib
import io
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from data_pipeline.children import hearing_signals
from data_pipeline.files import read_tokenizer
from data_pipeline.json_tokenizer import (
    NO_SPECIAL_TOKENS,
    HuggingFaceTokenizer,
    SpecialTokens,
)
from data_pipeline.records import ChoiceError, DataError
from data_pipeline.sentencepiece_file import read_model
from data_pipeline.spelling import spelling_of

_SPACE_MARK = "\u2581"
"""SentencePiece writes spaces as this character, so a literal one must be encoded as bytes."""
_MAX_SENTENCE = 4000
_LINE = 10.0
"""Seconds between two lines about a training."""


class Tokenizer(Protocol):
    """The interface of a tokenizer in the pipeline."""

    notes: list[str]
    """The settings of the file that are not used as they are, one line each."""

    @property
    def vocabulary_size(self) -> int:
        """Largest id of a token, plus 1."""

    @property
    def eod(self) -> int:
        """The end-of-document token."""

    @property
    def eod_name(self) -> str:
        """Its text."""

    @property
    def unknown(self) -> int | None:
        """The unknown token, if there is one."""

    @property
    def sha256(self) -> str:
        """Hash of the model file."""

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, int32, without the end-of-document token."""

    def inside(self, ids: np.ndarray) -> np.ndarray:
        """The tokens of a document's text, without those that are added around it."""

    def decode(self, ids: list[int] | np.ndarray) -> str:
        """Text of some token ids."""

    def spells(self, ids: np.ndarray, text: bytes) -> bool:
        """Whether ids are quickly seen to decode to a text (UTF-8); False says nothing."""

    def special_texts(self, text: str) -> int:
        """How often the text of a special token occurs in a text."""

    def causes(self) -> list[str]:
        """Parts of the file that may change a text."""


class SentencePieceTokenizer:
    """A SentencePiece model; decode(encode(x)) == x if the model keeps every byte."""

    def __init__(self, path: Path, eod_token: str | None = None) -> None:
        import sentencepiece

        self._data = read_tokenizer(path)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(self._data)
            self._spelling = spelling_of(self._processor, read_model(self._data))
        except (RuntimeError, ValueError):  # a message of the library may be no UTF-8
            raise DataError(f"{path}: not a SentencePiece model, or damaged") from None
        self._eod = self._find_eod(path, eod_token)
        self.notes: list[str] = []
        mark = [self._processor.PieceToId(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        self._mark = None if self._processor.unk_id() in mark else mark
        if self._mark is not None and self.decode(self._encode_with_marks("a\u2581b", mark)) != (
            "a\u2581b"
        ):
            self._mark = None  # for example a model that begins every part with a space

    def _find_eod(self, path: Path, eod_token: str | None) -> int:
        if eod_token is not None:
            token = int(self._processor.PieceToId(eod_token))
            if self._processor.IdToPiece(token) != eod_token:
                raise ChoiceError(f"{path}: has no piece {eod_token!r}; name another --eod-token")
            return token
        eod = int(self._processor.eos_id())
        if eod < 0:
            raise ChoiceError(
                f"{path}: this model has no end-of-sentence token to end documents; name one of "
                "its pieces with --eod-token"
            )
        return eod

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens; SentencePiece numbers them without gaps."""
        return int(self._processor.GetPieceSize())

    @property
    def eod(self) -> int:
        """The end-of-document token."""
        return self._eod

    @property
    def eod_name(self) -> str:
        """Its text."""
        return str(self._processor.IdToPiece(self._eod))

    @property
    def unknown(self) -> int | None:
        """The unknown token."""
        return int(self._processor.unk_id())

    @property
    def sha256(self) -> str:
        """Hash of the model file."""
        return hashlib.sha256(self._data).hexdigest()

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, int32."""
        encoded = self._arrays(texts)
        if self._mark is not None:
            for index, text in enumerate(texts):
                if _SPACE_MARK in text:
                    encoded[index] = self._encode_with_marks(text, self._mark)
        return encoded

    def _arrays(self, texts: list[str]) -> list[np.ndarray]:
        # Request arrays: lists of numbers would take a quarter of the encoding time.
        arrays: list[np.ndarray] = self._processor.Encode(texts, return_type="numpy", num_threads=1)
        return arrays

    def _encode_with_marks(self, text: str, mark: list[int]) -> np.ndarray:
        """Write a literal space mark as its bytes: as a piece it would decode to a space."""
        between = np.array(mark, dtype=np.int32)
        first, *later = self._arrays(text.split(_SPACE_MARK))
        return np.concatenate([first, *(part for array in later for part in (between, array))])

    def inside(self, ids: np.ndarray) -> np.ndarray:
        """All tokens of a document's text."""
        return ids

    def decode(self, ids: list[int] | np.ndarray) -> str:
        """Text of some token ids."""
        return str(self._processor.Decode(np.asarray(ids, dtype=np.int64).tolist()))

    def spells(self, ids: np.ndarray, text: bytes) -> bool:
        """Whether ids are quickly seen to decode to a text (UTF-8); False says nothing."""
        return self._spelling is not None and self._spelling.is_of(ids, text)

    def special_texts(self, text: str) -> int:
        """Always 0: to SentencePiece, names of control tokens are plain text."""
        return 0

    def causes(self) -> list[str]:
        """Parts of the model that may change a text."""
        model = read_model(self._data)
        changes = {
            f"normalisation {model.normalization}": model.normalization != "identity",
            "a space before the text": model.adds_space,
            "extra spaces removed": model.removes_spaces,
            "no byte fallback": not model.byte_fallback,
        }
        return [name for name, does in changes.items() if does]


def find_tokenizer(path: Path) -> Path:
    """The file of a tokenizer, given the file or its folder.

    Raises:
        DataError: if there is none.
    """
    if path.is_dir():
        inside = [path / name for name in ("tokenizer.model", "tokenizer.json")]
        path = next((file for file in inside if file.is_file()), path)
    if not path.is_file():
        raise ChoiceError(f"{path}: no such tokenizer; train one with `pretrain data tokenizer`")
    return path


def load_tokenizer(
    path: Path, eod_token: str | None = None, special: SpecialTokens = NO_SPECIAL_TOKENS
) -> Tokenizer:
    """A SentencePiece ``.model`` or a ``tokenizer.json`` (or a folder that holds one).

    Args:
        special: used only for a ``tokenizer.json``.

    Raises:
        DataError: if the file is missing or neither.
    """
    path = find_tokenizer(path)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, eod_token, special)
    return SentencePieceTokenizer(path, eod_token)


def name_of_token(path: Path, token: int) -> str | None:
    """The text of a token of a tokenizer's file, or None if it has no such token.

    Raises:
        DataError: if the file is missing or damaged.
    """
    import sentencepiece
    import tokenizers

    path = find_tokenizer(path)
    try:
        if path.suffix == ".json":
            made = tokenizers.Tokenizer.from_str(read_tokenizer(path).decode())
            name = made.id_to_token(token) if token >= 0 else None
            return None if name is None else str(name)
        processor = sentencepiece.SentencePieceProcessor(model_proto=read_tokenizer(path))
        return str(processor.IdToPiece(token)) if 0 <= token < processor.GetPieceSize() else None
    except DataError:
        raise
    except Exception as error:  # both libraries raise plain exceptions
        raise DataError(f"{path}: not a tokenizer ({str(error).splitlines()[0]})") from None


class VocabularyError(ChoiceError):
    """A vocabulary that the texts cannot fill."""

    def __init__(self, message: str, largest: int) -> None:
        super().__init__(message)
        self.largest = largest
        """The largest size that they can; 0: not known."""


def train_tokenizer(
    texts: Iterable[str],
    vocabulary_size: int,
    kind: Literal["unigram", "bpe"] = "bpe",
    max_bytes: int = 64 << 20,
    threads: int = 0,
) -> bytes:
    """Train a SentencePiece model that keeps every byte of every text.

    Byte fallback, identity normalisation, no dummy prefix, whitespace kept: indentation and
    newlines become pieces of their own.

    Args:
        max_bytes: how much text to learn from.

    Raises:
        VocabularyError: if the texts cannot fill such a vocabulary.
    """
    import sentencepiece

    writer = io.BytesIO()
    pieces = _Sentences(texts, max_bytes)

    def train() -> None:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(pieces),
            model_writer=writer,
            vocab_size=vocabulary_size,
            model_type=kind,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            user_defined_symbols=["\n", "\t"],
            unk_id=0,
            bos_id=-1,
            eos_id=1,
            pad_id=-1,
            max_sentence_length=4 * _MAX_SENTENCE,
            num_threads=threads or os.cpu_count() or 1,
            minloglevel=2,
        )

    try:
        hearing_signals(train, pieces.tell)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].split("] ")[-1]
        limit = re.search(r"<= (\d+)", reason)
        raise VocabularyError(
            f"cannot train a vocabulary of {vocabulary_size}: {reason}",
            int(limit.group(1)) if limit else 0,
        ) from None
    return writer.getvalue()


class _Sentences:
    """Lines of the texts, long ones cut: SentencePiece would skip them."""

    def __init__(self, texts: Iterable[str], max_bytes: int) -> None:
        self._texts, self._most = texts, max_bytes
        self._read, self._complete = 0, False
        self._began = self._shown = time.monotonic()

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            for line in text.replace(_SPACE_MARK, " ").splitlines():
                for start in range(0, len(line), _MAX_SENTENCE):
                    piece = line[start : start + _MAX_SENTENCE]
                    self._read += len(piece.encode("utf-8"))
                    if "\0" not in piece:
                        yield piece
            if self._read >= self._most:
                break
        self._complete = True

    def tell(self) -> None:
        """Print from time to time what is done: the library is silent for minutes."""
        now = time.monotonic()
        if now - self._shown >= _LINE:
            self._shown = now
            doing = "learning from" if self._complete else "read"
            print(
                f"tokenizer: {doing} {self._read / 1e6:,.1f} MB, {now - self._began:.0f} s so far",
                file=sys.stderr,
                flush=True,
            )

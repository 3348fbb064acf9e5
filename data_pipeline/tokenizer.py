"""Tokenizers: SentencePiece models trained here, or existing ones; lossless by construction."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from data_pipeline.sources import DataError

_SPACE_MARK = "\u2581"
"""SentencePiece writes spaces as this character, so that a real one needs a detour."""
_EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
_MAX_SENTENCE = 4000


class Tokenizer(Protocol):
    """What the pipeline asks of a tokenizer."""

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens."""

    @property
    def eod(self) -> int:
        """The end-of-document token."""

    @property
    def sha256(self) -> str:
        """Hash of the model file."""

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, int32, without special tokens."""

    def decode(self, ids: list[int]) -> str:
        """Text of some token ids."""


class SentencePieceTokenizer:
    """A SentencePiece model; decode(encode(x)) == x where the model keeps every byte."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self._data = path.read_bytes()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(self._data)
        except RuntimeError:
            raise DataError(f"{path}: not a SentencePiece model") from None
        eod = self._processor.eos_id()
        if eod < 0:
            raise DataError(f"{path}: this model has no end-of-sentence token to end documents")
        self._eod = int(eod)
        mark = [self._processor.PieceToId(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        self._mark = None if self._processor.unk_id() in mark else mark

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens."""
        return int(self._processor.GetPieceSize())

    @property
    def eod(self) -> int:
        """The end-of-document token."""
        return self._eod

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
        # As arrays from the start: lists of numbers take a quarter of the time to encode.
        found: list[np.ndarray] = self._processor.Encode(texts, return_type="numpy", num_threads=1)
        return found

    def _encode_with_marks(self, text: str, mark: list[int]) -> np.ndarray:
        """Write a literal space mark as its bytes: as a piece it would decode to a space."""
        between = np.array(mark, dtype=np.int32)
        first, *others = self._arrays(text.split(_SPACE_MARK))
        return np.concatenate([first, *(part for one in others for part in (between, one))])

    def decode(self, ids: list[int]) -> str:
        """Text of some token ids."""
        return str(self._processor.Decode(ids))


class HuggingFaceTokenizer:
    """A ``tokenizer.json``."""

    def __init__(self, path: Path, eod_token: str | None = None) -> None:
        # Parallelism is over processes here; the library's own threads would oversubscribe.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import tokenizers

        self._data = path.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(self._data.decode("utf-8"))
        except Exception:  # the library raises plain Exception
            raise DataError(f"{path}: not a Hugging Face tokenizer.json") from None
        names = (eod_token,) if eod_token else _EOD_NAMES
        found = [self._tokenizer.token_to_id(name) for name in names]
        eods = [token for token in found if token is not None]
        if not eods:
            raise DataError(
                f"{path}: no end-of-document token among {', '.join(names)}; name it with "
                "--eod-token"
            )
        self._eod = int(eods[0])

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def eod(self) -> int:
        """The end-of-document token."""
        return self._eod

    @property
    def sha256(self) -> str:
        """Hash of the file."""
        return hashlib.sha256(self._data).hexdigest()

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, int32."""
        encoded = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [np.array(one.ids, dtype=np.int32) for one in encoded]

    def decode(self, ids: list[int]) -> str:
        """Text of some token ids."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


def load_tokenizer(path: Path, eod_token: str | None = None) -> Tokenizer:
    """A SentencePiece ``.model`` or a ``tokenizer.json`` (or a folder that holds one).

    Raises:
        DataError: if the file is missing or neither.
    """
    if path.is_dir():
        inside = [path / name for name in ("tokenizer.model", "tokenizer.json")]
        path = next((file for file in inside if file.is_file()), path)
    if not path.is_file():
        raise DataError(f"{path}: no such tokenizer; train one with `pretrain data tokenizer`")
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, eod_token)
    return SentencePieceTokenizer(path)


def train_tokenizer(
    texts: Iterable[str],
    vocabulary_size: int,
    kind: Literal["unigram", "bpe"] = "unigram",
    max_bytes: int = 64 << 20,
    threads: int = 0,
) -> bytes:
    """Train a SentencePiece model that keeps every byte of every text.

    Byte fallback, identity normalisation, no dummy prefix, whitespace kept: indentation and
    newlines become pieces of their own.

    Args:
        max_bytes: how much text to learn from; the iteration stops there.

    Raises:
        DataError: if the texts cannot fill such a vocabulary.
    """
    import sentencepiece

    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=_sentences(texts, max_bytes),
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
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].split("] ")[-1]
        raise DataError(f"cannot train a vocabulary of {vocabulary_size}: {reason}") from None
    return writer.getvalue()


def _sentences(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Lines of the texts, long ones cut: SentencePiece would skip them."""
    total = 0
    for text in texts:
        for line in text.replace(_SPACE_MARK, " ").splitlines():
            for start in range(0, len(line), _MAX_SENTENCE):
                piece = line[start : start + _MAX_SENTENCE]
                total += len(piece.encode("utf-8"))
                if "\0" not in piece:
                    yield piece
        if total >= max_bytes:
            return

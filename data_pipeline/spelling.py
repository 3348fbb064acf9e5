"""What token ids spell, without a decoder: their pieces put together, in a few array operations."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from data_pipeline.sentencepiece_file import Model

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE_MARK = "\u2581"


class Spelling:
    """Spells the ids of a SentencePiece model that changes no text before it cuts it.

    Args:
        processor: a `sentencepiece.SentencePieceProcessor`.
    """

    def __init__(self, processor: Any) -> None:
        texts = [_bytes_of(processor, piece) for piece in range(processor.GetPieceSize())]
        self._lengths = np.array([len(text) for text in texts], dtype=np.int32)
        self._starts = np.cumsum(self._lengths, dtype=np.int32) - self._lengths
        self._letters = np.frombuffer(b"".join(texts), dtype=np.uint8)

    def is_of(self, ids: np.ndarray, text: bytes) -> bool:
        """Whether ``ids`` spell exactly ``text`` (UTF-8); then they decode to it, too."""
        lengths = self._lengths[ids]
        total = int(lengths.sum(dtype=np.int64))
        if total != len(text):
            return False
        first = self._starts[ids] - (np.cumsum(lengths, dtype=np.int32) - lengths)
        places = np.repeat(first, lengths)
        places += np.arange(total, dtype=np.int32)
        return bool(np.array_equal(self._letters[places], np.frombuffer(text, dtype=np.uint8)))


def spelling_of(processor: Any, model: Model) -> Spelling | None:
    """The spelling of a model; None where decoding is more than putting pieces together."""
    is_plain = (
        model.normalization == "identity"
        and not model.adds_space
        and not model.removes_spaces
        and model.escapes_spaces
        and not model.space_after
        and not model.changes_decoded
    )
    return Spelling(processor) if is_plain else None


def _bytes_of(processor: Any, piece: int) -> bytes:
    """What a piece adds to a text; nothing where that depends on its neighbours."""
    name = str(processor.IdToPiece(piece))
    if processor.IsControl(piece) or processor.IsUnknown(piece) or processor.IsUnused(piece):
        return b""
    if processor.IsByte(piece):
        match = _BYTE_PIECE.fullmatch(name)
        return bytes([int(match[1], 16)]) if match else b""
    return name.replace(_SPACE_MARK, " ").encode("utf-8")

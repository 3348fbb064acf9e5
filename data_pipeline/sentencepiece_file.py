"""The parts of a SentencePiece ``.model`` file that the library does not tell.

The file is a protocol buffer (sentencepiece_model.proto of google/sentencepiece). The class that
the package has for it needs one of the newest versions of ``protobuf``, which it does not install.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from data_pipeline.records import DataError

BPE = 2
"""`Model.kind` of byte-pair encoding; 1 is unigram."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
"""Values of `Piece.type`."""
_UNIGRAM = 1


@dataclass(frozen=True)
class Piece:
    """A piece of the vocabulary; its place in the list is its id."""

    piece: str
    score: float
    type: int


@dataclass(frozen=True)
class Model:
    """A model and what it does to a text before it cuts it."""

    pieces: list[Piece]
    kind: int
    byte_fallback: bool
    space_after: bool
    """Whether spaces end a piece and do not begin it (``treat_whitespace_as_suffix``)."""
    normalization: str
    adds_space: bool
    """A space is put before every text (``add_dummy_prefix``)."""
    removes_spaces: bool
    """Spaces at both ends and repeated ones are dropped (``remove_extra_whitespaces``)."""
    escapes_spaces: bool
    changes_decoded: bool
    """Whether characters are replaced in decoded text."""


def read_model(data: bytes) -> Model:
    """Parse a model.

    Raises:
        DataError: if it is no protocol buffer.
    """
    try:
        whole = list(_fields(data))
        trainer, normalizer, denormalizer = (_message(whole, number) for number in (2, 3, 5))
        return Model(
            pieces=[_piece(value) for number, value in whole if number == 1],
            kind=int(trainer.get(3, _UNIGRAM)),
            byte_fallback=bool(trainer.get(35, 0)),
            space_after=bool(trainer.get(24, 0)),
            normalization=_bytes(normalizer.get(1, b"")).decode(),
            adds_space=bool(normalizer.get(3, 1)),
            removes_spaces=bool(normalizer.get(4, 1)),
            escapes_spaces=bool(normalizer.get(5, 1)),
            changes_decoded=bool(denormalizer.get(2, b"")),
        )
    except (IndexError, struct.error, TypeError, ValueError) as error:
        raise DataError(f"not a SentencePiece model ({error})") from None


Value = int | bytes | float
"""Of a field: a varint, a string or message, or a 32-bit float (64-bit ones as bytes)."""


def _message(fields: list[tuple[int, Value]], number: int) -> dict[int, Value]:
    """The last value of each field of a message; of no message there are none."""
    last: dict[int, Value] = {}
    for field, value in fields:
        if field == number:
            last |= dict(_fields(_bytes(value)))
    return last


def _piece(value: Value) -> Piece:
    fields = dict(_fields(_bytes(value)))
    text, score = _bytes(fields.get(1, b"")), float(fields.get(2, 0.0))
    return Piece(text.decode(), score, int(fields.get(3, NORMAL)))


def _bytes(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError("a field has another type")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """(number, value) of every field of a message, in the order of the file."""
    offset = 0
    while offset < len(data):
        key, offset = _varint(data, offset)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, offset = _varint(data, offset)
            yield number, value
        elif wire == 5:
            yield number, struct.unpack_from("<f", data, offset)[0]
            offset += 4
        else:
            size, offset = _varint(data, offset) if wire == 2 else (8, offset)
            if wire not in (1, 2) or offset + size > len(data):
                raise ValueError("a field is cut off")
            yield number, data[offset : offset + size]
            offset += size


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    """An integer, seven bits a byte, and where it ends."""
    value = shift = 0
    while True:
        byte = data[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, offset
        shift += 7

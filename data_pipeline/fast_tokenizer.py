"""Converts a SentencePiece model to a ``tokenizer.json``, if that gives the same tokens.

`tokenizers` has the same two models (unigram, BPE with byte fallback). The settings around them are
written explicitly: no normalisation except the space mark, no split into words before pieces.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from data_pipeline.account import TRIALS
from data_pipeline.files import read_tokenizer
from data_pipeline.records import DataError
from data_pipeline.sentencepiece_file import (
    BPE,
    BYTE,
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    Model,
    Piece,
    read_model,
)
from data_pipeline.tokenizer import SentencePieceTokenizer, Tokenizer

_MARK = "\u2581"


def special_names(path: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """Names of the end-of-document and unknown tokens, in the form of ``tokenizer_config.json``."""
    names = {"eos_token": tokenizer.eod_name}
    if isinstance(tokenizer, SentencePieceTokenizer):
        pieces = read_model(read_tokenizer(path)).pieces
        names["unk_token"] = next(piece.piece for piece in pieces if piece.type == UNKNOWN)
    return names


def other_tokens(text: str, tokenizer: Tokenizer, names: list[str], as_text: bool) -> str:
    """A text for which `transformers` would give other tokens than the run; empty if none is found.

    `transformers` treats every token that ``tokenizer_config.json`` names as a special one.

    Args:
        text: of a ``tokenizer.json``.
        names: the tokens that ``tokenizer_config.json`` names.
        as_text: keep the text of special tokens as text (``split_special_tokens``).
    """
    import tokenizers

    theirs = tokenizers.Tokenizer.from_str(text)
    theirs.add_special_tokens(list(dict.fromkeys(names)))
    theirs.encode_special_tokens = as_text
    added = [token.content for token in theirs.get_added_tokens_decoder().values()]
    for trial in (*TRIALS, *(f"a{name}b {name} c" for name in added)):
        try:
            ours = tokenizer.inside(tokenizer.encode([trial])[0]).tolist()
        except DataError:
            continue  # this tokenizer cannot encode the text
        if theirs.encode(trial, add_special_tokens=False).ids != ours:
            return trial
    return ""


def fast_tokenizer(path: Path, texts: list[str], eod_name: str | None = None) -> str | None:
    """The text of a ``tokenizer.json`` with the tokens of a SentencePiece model.

    Args:
        texts: on which both must agree, in addition to built-in ones.
        eod_name: the piece that ends documents; None: the model's own.

    Returns:
        None if they do not agree (a kind of model that `tokenizers` does not have).
    """
    import tokenizers

    slow = SentencePieceTokenizer(path, eod_name)
    try:
        text = json.dumps(_tree(read_model(read_tokenizer(path))), ensure_ascii=False)
        fast = tokenizers.Tokenizer.from_str(text)
    except Exception:  # the library raises plain Exception
        return None
    fast.encode_special_tokens = True  # text of a document, not commands
    # Only a literal space mark cannot be distinguished from a space in this format.
    trials = [example.replace(_MARK, " ") for example in [*TRIALS, *texts]]
    for trial in trials:
        if fast.encode(trial, add_special_tokens=False).ids != slow.encode([trial])[0].tolist():
            return None
    return text


def _tree(model: Model) -> dict[str, Any]:
    is_bpe = model.kind == BPE
    special = [piece.piece for piece in model.pieces if piece.type in (UNKNOWN, CONTROL)]
    # User-defined symbols are cut out before anything else, in both libraries.
    added = [
        {
            "id": number, "content": piece.piece, "special": piece.type != USER_DEFINED,
            "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
        }
        for number, piece in enumerate(model.pieces)
        if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)
    ]  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _MARK},
        "pre_tokenizer": None if is_bpe else _names_apart(special),
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _MARK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": _bpe(model.pieces) if is_bpe else _unigram(model.pieces),
    }


def _names_apart(special: list[str]) -> dict[str, Any]:
    """Cut after the first letter of text that only looks like a token's name, such as <0x0A>.

    `tokenizers` would treat it as the token, while SentencePiece reads letters.
    """
    rest = "|".join([*(re.escape(name[1:]) for name in special), "0x[0-9A-F]{2}>"])
    pattern = {"Regex": f"(?<=<)(?={rest})"}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def _unigram(pieces: list[Piece]) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": next(number for number, piece in enumerate(pieces) if piece.type == UNKNOWN),
        "vocab": [[piece.piece, piece.score] for piece in pieces],
        "byte_fallback": True,
    }


def _bpe(pieces: list[Piece]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": next(piece.piece for piece in pieces if piece.type == UNKNOWN),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {piece.piece: number for number, piece in enumerate(pieces)},
        "merges": _merges(pieces),
    }


def _merges(pieces: list[Piece]) -> list[list[str]]:
    """Every way to make a piece from two others, best pieces first."""
    numbers = {
        entry.piece: number for number, entry in enumerate(pieces)
        if entry.type not in (UNKNOWN, CONTROL, BYTE)
    }  # fmt: skip
    candidates = []
    for piece, number in numbers.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in numbers and right in numbers:
                candidates.append(
                    (-pieces[number].score, numbers[left], numbers[right], [left, right])
                )
    candidates.sort(key=lambda entry: entry[:3])
    return [merge for *_, merge in candidates]

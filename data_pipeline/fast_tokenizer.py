"""Converts a SentencePiece model to a ``tokenizer.json``, if that gives the same tokens.

`tokenizers` has the same two models (unigram, BPE with byte fallback). The settings around them are
written explicitly: no normalisation except the space mark, no split into words before pieces.

BPE gives the same tokens. Unigram does so except for ties: of two ways to cut a text whose pieces
have the same total score, SentencePiece chooses by the rounding of its float32 sums, which depends
on the text before, and `tokenizers` by that of float64 sums.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.account import TRIALS
from data_pipeline.files import read_tokenizer
from data_pipeline.records import DataError
from data_pipeline.sentencepiece_file import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Model,
    Piece,
    read_model,
)
from data_pipeline.tokenizer import SentencePieceTokenizer, Tokenizer

_MARK = "\u2581"
_NEVER = -1e4
"""A score far below that of the letters of a token's name together."""


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


@dataclass(frozen=True)
class Conversion:
    """A SentencePiece model in the format of `tokenizers`."""

    text: str | None
    """Of a ``tokenizer.json``; None if it would not do."""
    differs: str
    """A text, or a line of one, to which it gives other tokens; empty if none was found."""


def fast_tokenizer(path: Path, texts: list[str], eod_name: str | None = None) -> Conversion:
    """Convert a SentencePiece model, and compare the tokens of both.

    Args:
        texts: on which both must agree, in addition to built-in ones.
        eod_name: the piece that ends documents; None: the model's own.

    Returns:
        A conversion without a text if they do not agree (a kind of model that `tokenizers` does not
        have); other tokens of a unigram model with the same total score are accepted.
    """
    import tokenizers

    slow = SentencePieceTokenizer(path, eod_name)
    model = read_model(read_tokenizer(path))
    try:
        text = json.dumps(_tree(model), ensure_ascii=False)
        fast = tokenizers.Tokenizer.from_str(text)
    except Exception:  # the library raises plain Exception
        return Conversion(None, "")
    fast.encode_special_tokens = True  # text of a document, not commands

    def both(trial: str) -> tuple[list[int], list[int]]:
        theirs: list[int] = fast.encode(trial, add_special_tokens=False).ids
        return slow.encode([trial])[0].tolist(), theirs

    # Only a literal space mark cannot be distinguished from a space in this format.
    trials = [example.replace(_MARK, " ") for example in [*TRIALS, *texts]]
    differs = []
    for trial in trials:
        ours, theirs = both(trial)
        if ours == theirs:
            continue
        differs.append(trial)
        if model.kind == BPE or not _is_tie(model.pieces, ours, theirs):
            return Conversion(None, trial)
    if not differs:
        return Conversion(text, "")
    shortest = min(differs, key=len)
    lines = [line for line in shortest.splitlines() if len({*map(tuple, both(line))}) > 1]
    return Conversion(text, min(lines, key=len, default=shortest))


def _is_tie(pieces: list[Piece], ours: list[int], theirs: list[int]) -> bool:
    """Whether the pieces that differ have the same total score, to the rounding of float32 sums."""
    mine, others = Counter(ours), Counter(theirs)
    changed = [*(mine - others).elements()], [*(others - mine).elements()]
    if any(pieces[number].type != NORMAL for side in changed for number in side):
        return False
    gain = [sum(pieces[number].score for number in side) for side in changed]
    largest = sum(abs(pieces[number].score) for number in ours)
    return abs(gain[0] - gain[1]) <= 2.0**-22 * largest * max(1, *map(len, changed))


def _tree(model: Model) -> dict[str, Any]:
    is_bpe = model.kind == BPE
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
        "pre_tokenizer": None if is_bpe else _names_apart(model.pieces),
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


def _names_apart(pieces: list[Piece]) -> dict[str, Any] | None:
    """Cut text that only looks like a token's name, at a letter that the vocabulary does not have.

    The score of a name is bad, but that of as many unknown letters is worse. SentencePiece cuts at
    such a letter too.
    """
    letters = {piece.piece for piece in pieces if piece.type == NORMAL}
    places = []
    for name in (piece.piece for piece in pieces if piece.type in (UNKNOWN, CONTROL)):
        missing = [place for place, letter in enumerate(name) if letter not in letters]
        if missing and len(name) > 1:
            cut = max(1, missing[0])
            places.append((re.escape(name[:cut]), re.escape(name[cut:])))
    digit, unknown = "[0-9A-F]", "".join(sorted(set("0123456789ABCDEF") - letters))
    if not letters >= set("<0"):
        places.append(("<", f"0x{digit}{digit}>"))
    elif "x" not in letters:
        places.append(("<0", f"x{digit}{digit}>"))
    elif ">" not in letters:
        places.append((f"<0x{digit}{digit}", ">"))
    elif unknown:
        places += [("<0x", f"[{unknown}]{digit}>"), (f"<0x{digit}", f"[{unknown}]>")]
    if not places:
        return None
    pattern = "|".join(f"(?<={before})(?={after})" for before, after in places)
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _unigram(pieces: list[Piece]) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": next(number for number, piece in enumerate(pieces) if piece.type == UNKNOWN),
        "vocab": [[piece.piece, _score(piece)] for piece in pieces],
        "byte_fallback": True,
    }


def _score(piece: Piece) -> float:
    """The score of a piece; a text that looks like a token's name (<0x0A>) must not become it.

    In SentencePiece such tokens are not in any text; in `tokenizers` every entry may be.
    """
    return _NEVER if piece.type in (UNKNOWN, CONTROL, BYTE) else piece.score


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

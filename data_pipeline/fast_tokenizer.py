"""A SentencePiece model as a ``tokenizer.json``, where that gives the same tokens.

`tokenizers` has the same two models (unigram, BPE with byte fallback); what is around them is
written out: no normalisation but the space mark, no words before pieces.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from data_pipeline.sources import DataError
from data_pipeline.tokenizer import SentencePieceTokenizer, load_tokenizer

_MARK = "\u2581"
_BPE = 2
_TRIALS = (
    "The quick brown fox, 12345 times.\n\tdef f(x):\n        return x ** 2  # ok\r\n\n\n",
    "  leading and trailing  ", "", " ", "\n", "naïve café — 漢字かな交じり文 🙂🙃 \u200b\ufeff",
    "a" * 300 + " " * 70 + "\t\t\n\n" + "0123456789" * 5, "</s> <unk> <0x0A> <|endoftext|>",
    "Привет, мир! \x01\x7f ½ ﬁ Å \u0301", "x\u00a0y\u3000z",
)  # fmt: skip


def special_names(path: Path) -> dict[str, str]:
    """Names of the end-of-document and unknown tokens, as ``tokenizer_config.json`` wants them."""
    loaded = load_tokenizer(path)
    if isinstance(loaded, SentencePieceTokenizer):
        model = _processor(path)
        names = {"eos_token": model.IdToPiece(model.eos_id())}
        return names | {"unk_token": model.IdToPiece(model.unk_id())}
    import tokenizers

    return {"eos_token": str(tokenizers.Tokenizer.from_file(str(path)).id_to_token(loaded.eod))}


def fast_tokenizer(path: Path, texts: list[str]) -> str | None:
    """The text of a ``tokenizer.json`` with the tokens of a SentencePiece model.

    Args:
        texts: beside built-in ones, on which both must agree.

    Returns:
        None where they do not agree (a kind of model that `tokenizers` does not have).
    """
    import tokenizers

    model = _processor(path)
    try:
        text = json.dumps(_tree(model, path), ensure_ascii=False)
        fast = tokenizers.Tokenizer.from_str(text)
    except Exception:  # the library raises plain Exception
        return None
    fast.encode_special_tokens = True  # words of a document, not commands
    slow = SentencePieceTokenizer(path)
    # A literal space mark is the one thing that this form cannot tell from a space.
    trials = [one.replace(_MARK, " ") for one in [*_TRIALS, *texts]]
    for trial in trials:
        if fast.encode(trial, add_special_tokens=False).ids != slow.encode([trial])[0]:
            return None
    return text


def _processor(path: Path) -> Any:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromFile(str(path))
    except (RuntimeError, OSError):
        raise DataError(f"{path}: not a SentencePiece model") from None
    return model


def _tree(model: Any, path: Path) -> dict[str, Any]:
    pieces = [model.IdToPiece(number) for number in range(model.GetPieceSize())]
    special = [
        number
        for number in range(len(pieces))
        if model.IsControl(number) or model.IsUnknown(number)
    ]
    # User-defined symbols are cut out before anything else, in both libraries.
    cut = [number for number in range(len(pieces)) if _is_user_defined(model, number)]
    added = [
        {
            "id": number, "content": pieces[number], "special": number in special,
            "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
        }
        for number in sorted([*special, *cut])
    ]  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _MARK},
        "pre_tokenizer": None if _kind(path) == _BPE else _names_apart(pieces, special),
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _MARK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": _model(model, pieces, path),
    }


def _names_apart(pieces: list[str], special: list[int]) -> dict[str, Any]:
    """Cut after the first letter of what only looks like the name of a token, such as <0x0A>.

    `tokenizers` would take it for the token, SentencePiece reads letters.
    """
    names = [re.escape(pieces[number][1:]) for number in special]
    rest = "|".join([*names, "0x[0-9A-F]{2}>"])
    pattern = {"Regex": f"(?<=<)(?={rest})"}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def _is_user_defined(model: Any, number: int) -> bool:
    plain = model.IsControl(number) or model.IsUnknown(number) or model.IsByte(number)
    # SentencePiece gives user-defined pieces a score of zero, and trained ones less.
    return not plain and model.GetScore(number) == 0.0 and len(model.IdToPiece(number)) == 1


def _model(model: Any, pieces: list[str], path: Path) -> dict[str, Any]:
    scores = [float(model.GetScore(number)) for number in range(len(pieces))]
    if _kind(path) == _BPE:
        return {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.IdToPiece(model.unk_id()),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: number for number, piece in enumerate(pieces)},
            "merges": _merges(model, pieces, scores),
        }
    return {
        "type": "Unigram",
        "unk_id": model.unk_id(),
        "vocab": [[piece, score] for piece, score in zip(pieces, scores, strict=True)],
        "byte_fallback": True,
    }


def _kind(path: Path) -> int:
    """Unigram or BPE, as the model's own description says."""
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = getattr(sentencepiece_model_pb2, "ModelProto")()  # noqa: B009 (made at run time)
    proto.ParseFromString(path.read_bytes())
    return int(proto.trainer_spec.model_type)


def _merges(model: Any, pieces: list[str], scores: list[float]) -> list[list[str]]:
    """Every way that a piece comes from two others, best pieces first."""
    known = {
        piece: number for number, piece in enumerate(pieces)
        if not (model.IsControl(number) or model.IsUnknown(number) or model.IsByte(number))
    }  # fmt: skip
    found = []
    for piece, number in known.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in known and right in known:
                found.append((-scores[number], known[left], known[right], [left, right]))
    found.sort(key=lambda one: one[:3])
    return [merge for *_, merge in found]

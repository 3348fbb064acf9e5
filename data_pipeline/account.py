"""Measures how exactly a tokenizer reproduces documents: what comes back, and what does not."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from data_pipeline.records import DataError
from data_pipeline.tokenizer import Tokenizer

_EXAMPLES = 3
_SHOWN = 30
"""Number of characters that an example shows before and after the first difference."""

TRIALS = (
    "The quick brown fox, 12345 times.\n\tdef f(x):\n        return x ** 2  # ok\r\n\n\n",
    "  leading and trailing  ", "", " ", "\n", "naïve café — 漢字かな交じり文 🙂🙃 \u200b\ufeff",
    "a" * 300 + " " * 70 + "\t\t\n\n" + "0123456789" * 5, "</s> <unk> <0x0A> <|endoftext|>",
    "Привет, мир! \x01\x7f ½ ﬁ Å \u0301", "x\u00a0y\u3000z",
)  # fmt: skip
"""Texts that a lossless tokenizer reproduces."""


@dataclass
class Account:
    """Counts over documents that were encoded and decoded again for comparison."""

    documents: int = 0
    exact: int = 0
    """Documents whose text is reproduced exactly."""
    bytes: int = 0
    """UTF-8 bytes of their texts."""
    bytes_back: int = 0
    """Bytes of the characters that are reproduced, anywhere in the text."""
    tokens: int = 0
    """Tokens of the texts, without added ones."""
    unknown: int = 0
    unknown_documents: int = 0
    eod_inside: int = 0
    """End-of-document tokens inside texts."""
    eod_documents: int = 0
    special_texts: int = 0
    """Occurrences of the text of special tokens in documents."""
    special_documents: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, other: Account) -> None:
        """Add the counts of another account."""
        for name, value in vars(other).items():
            if name != "examples":
                setattr(self, name, getattr(self, name) + value)
        self.examples = (self.examples + other.examples)[:_EXAMPLES]

    def values(self) -> dict[str, Any]:
        """The counts as values for a manifest."""
        return asdict(self)

    @property
    def is_exact(self) -> bool:
        """Whether every text is reproduced."""
        return self.exact == self.documents


def account_of(tokenizer: Tokenizer, texts: list[str], ids: list[np.ndarray]) -> Account:
    """Decode documents and compare.

    Args:
        ids: the token ids of each text.
    """
    account = Account(documents=len(texts))
    for text, whole in zip(texts, ids, strict=True):
        inside = tokenizer.inside(whole)
        raw = text.encode("utf-8")
        account.bytes += len(raw)
        account.tokens += len(inside)
        _count(account, "eod_inside", "eod_documents", int((inside == tokenizer.eod).sum()))
        if tokenizer.unknown is not None:
            unknown = int((inside == tokenizer.unknown).sum())
            _count(account, "unknown", "unknown_documents", unknown)
        _count(account, "special_texts", "special_documents", tokenizer.special_texts(text))
        _compare(account, text, raw, tokenizer, inside)
    return account


def why_lossy(tokenizer: Tokenizer) -> str:
    """Why a tokenizer does not reproduce every one of `TRIALS`; empty if it does."""
    try:
        account = account_of(tokenizer, list(TRIALS), tokenizer.encode(list(TRIALS)))
    except DataError:
        return "it cannot encode every text"
    return "" if account.is_exact else ", ".join(tokenizer.causes()) or "its vocabulary"


def _count(account: Account, total: str, documents: str, count: int) -> None:
    setattr(account, total, getattr(account, total) + count)
    setattr(account, documents, getattr(account, documents) + (count > 0))


def _decoded(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    try:
        return tokenizer.decode(ids)
    except DataError:  # a decoder that cannot
        return ""


def _compare(
    account: Account, text: str, raw: bytes, tokenizer: Tokenizer, ids: np.ndarray
) -> None:
    back = text if tokenizer.spells(ids, raw) else _decoded(tokenizer, ids)
    if back == text:
        account.exact += 1
        account.bytes_back += len(raw)
        return
    # The name of the unknown token does not count as reproduced text.
    known = ids if tokenizer.unknown is None else ids[ids != tokenizer.unknown]
    common = Counter(text) & Counter(back if known is ids else _decoded(tokenizer, known))
    account.bytes_back += sum(
        len(character.encode("utf-8")) * count for character, count in common.items()
    )
    if len(account.examples) < _EXAMPLES:
        account.examples.append(_example(text, back))


def _example(text: str, back: str) -> str:
    """Both texts around their first difference."""
    same = next(
        (index for index, (a, b) in enumerate(zip(text, back, strict=False)) if a != b),
        min(len(text), len(back)),
    )
    start = max(0, same - _SHOWN)
    return f"{text[start : same + _SHOWN]!r} comes back as {back[start : same + _SHOWN]!r}"


def share(part: int, whole: int) -> str:
    """A share in percent, never rounded up to 100."""
    if part == whole:
        return "100 %"
    return f"{int(1e6 * part / whole) / 1e4:.4f} %"


def described(account: Account, tokenizer: Tokenizer, parses_special: bool) -> list[str]:
    """What to know about documents under this tokenizer, one line each."""
    counts = account
    lines = [
        f"round trip: {counts.exact:,} of {counts.documents:,} documents come back exactly, "
        f"{share(counts.bytes_back, counts.bytes)} of their bytes"
    ]
    if not counts.is_exact:
        causes = ", ".join(tokenizer.causes()) or "its vocabulary"
        lines[0] += f"; {counts.examples[0]} ({causes}); --lossless refuses such a tokenizer"
    if counts.unknown:
        lines.append(
            f"unknown tokens: {counts.unknown:,} of {counts.tokens:,} "
            f"({share(counts.unknown, counts.tokens)}), in {counts.unknown_documents:,} documents: "
            "the vocabulary does not fit this text"
        )
    if counts.special_texts:
        taken = "made these tokens" if parses_special else "kept as text (--parse-special-tokens)"
        lines.append(
            f"text of special tokens: {counts.special_texts:,} times, in "
            f"{counts.special_documents:,} documents: {taken}"
        )
    if counts.eod_inside:
        lines.append(
            f"{tokenizer.eod_name} inside texts: {counts.eod_inside:,} times, in "
            f"{counts.eod_documents:,} documents: the model will treat it as an end of document"
        )
    return lines

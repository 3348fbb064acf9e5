"""SentencePiece models in the format of `tokenizers`: the same tokens, or a tie that is named."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from data_pipeline.fast_tokenizer import fast_tokenizer
from data_pipeline.records import DataError
from data_pipeline.sentencepiece_file import NORMAL, _fields, read_model
from data_pipeline.tokenizer import SentencePieceTokenizer, train_tokenizer

pytestmark = pytest.mark.slow


def varint(value: int) -> bytes:
    out = b""
    while value >= 128:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def piece(text: str, score: float, kind: int) -> bytes:
    parts = message(1, text.encode()), varint(2 << 3 | 5), struct.pack("<f", score)
    return message(1, b"".join([*parts, varint(3 << 3), varint(kind)]))


def with_pieces(base: bytes, texts: list[str]) -> bytes:
    """A model with the names and bytes of ``base`` and these pieces, best first."""
    kept = [entry for entry in read_model(base).pieces if entry.type != NORMAL]
    rest = [message(number, bytes(value)) for number, value in _fields(base)  # type: ignore[arg-type]
            if number != 1]  # fmt: skip
    pieces = [piece(entry.piece, entry.score, entry.type) for entry in kept]
    pieces += [piece(text, -float(number), NORMAL) for number, text in enumerate(texts)]
    return b"".join([*pieces, *rest])


def random_pieces(rng: random.Random, letters: str) -> list[str]:
    """Pieces in which one occurs in another, repeats, and can be made in several ways."""
    some = {"".join(rng.choices(letters, k=rng.randint(2, 5))) for _ in range(rng.randint(3, 14))}
    if rng.random() < 0.5:
        some |= {text[:stop] for text in some for stop in range(2, len(text))}
    ordered = sorted(some)
    rng.shuffle(ordered)
    return [*ordered, *letters] if rng.random() < 0.5 else [*sorted(ordered, key=len), *letters]


def seeds(every: int, long: int) -> Iterator[object]:
    yield pytest.param(every, id="sample")
    yield pytest.param(long, id="long", marks=pytest.mark.long)


@pytest.mark.parametrize("count", seeds(12, 1500))
def test_bpe_gives_the_same_tokens(count: int, tmp_path: Path) -> None:
    """Of any vocabulary, trained or not: no tie is broken in another way."""
    base = train_tokenizer(["ab ba abba"] * 50, 264, "bpe")
    path, joined = tmp_path / "some.model", 0
    for seed in range(count):
        rng = random.Random(seed)
        letters = rng.choice(["a", "ab", "abc"])
        path.write_bytes(with_pieces(base, random_pieces(rng, letters)))
        texts = ["".join(rng.choices(letters, k=rng.randint(1, 40))) for _ in range(150)]
        texts += ["a" * length for length in range(1, 30)]
        made = fast_tokenizer(path, texts)
        assert made.text is not None and not made.differs, (seed, made.differs)
        joined += len(SentencePieceTokenizer(path).encode([texts[0]])[0]) < len(texts[0])
    assert joined > count / 2  # the vocabularies do join letters


def test_unigram_differs_only_in_ties(tmp_path: Path) -> None:
    """Runs of one character can be cut in several orders of the same pieces."""
    rng = random.Random(1)
    texts = [f"x {' ' * rng.randint(1, 40)}y{'#' * rng.randint(1, 60)}" for _ in range(400)]
    path = tmp_path / "some.model"
    path.write_bytes(train_tokenizer(texts, 285, "unigram"))
    made = fast_tokenizer(path, ["\n".join(texts)])
    assert made.text is not None
    assert made.differs and "\n" not in made.differs  # a line, not the whole text
    fast = tokenizers.Tokenizer.from_str(made.text)
    fast.encode_special_tokens = True
    slow = SentencePieceTokenizer(path)
    ours = slow.encode([made.differs])[0].tolist()
    theirs = fast.encode(made.differs, add_special_tokens=False).ids
    assert ours != theirs and fast.decode(theirs) == slow.decode(ours) == made.differs
    # A conversion with other scores is no tie.
    tree = json.loads(made.text)
    for entry in tree["model"]["vocab"]:
        entry[1] *= 1.5 if len(entry[0]) > 2 else 1.0
    import data_pipeline.fast_tokenizer as module

    original = module._tree
    module._tree = lambda model: tree
    try:
        assert fast_tokenizer(path, texts).text is None
    finally:
        module._tree = original


NAMES = ["<0x0A></s>", "</s", "<0x0A", "a<unk>", "<unk><unk", "</s> <unk> <0x0A> <0xFA> <0xAA>"]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_names_of_tokens_are_text(kind: Any, tmp_path: Path) -> None:
    """Whatever letters of a name the vocabulary has, and also where a piece holds several."""
    path, held = tmp_path / "some.model", set()
    for known in ("", "<", "</s>", "<unk>", "<0x>", "<0x0A>", "0123456789ABCDEF", "</sunk0x>A"):
        texts = [f"x y {known} {known[:2]} {known[:3]} z{known}z" * 3, "ab ba"] * 40
        size = 300
        while size:
            try:
                path.write_bytes(train_tokenizer(texts, size, kind))
                break
            except DataError:
                size -= 1
        held |= {entry.piece for entry in read_model(path.read_bytes()).pieces
                 if entry.type == NORMAL}  # fmt: skip
        made = fast_tokenizer(path, [*texts, *NAMES])
        assert made.text is not None, (known, made.differs)
        assert made.differs not in NAMES
    assert any(len(one.strip("\u2581")) > 1 and "<" in one for one in held)

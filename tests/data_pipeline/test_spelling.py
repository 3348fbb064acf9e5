"""What a SentencePiece model spells is what it decodes, for every way to make such a model."""

from __future__ import annotations

import contextlib
import io
import itertools
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from data_pipeline.account import account_of
from data_pipeline.records import DataError
from data_pipeline.sentencepiece_file import Piece, read_model
from data_pipeline.tokenizer import SentencePieceTokenizer, load_tokenizer
from tests.tools import ROOT

pytestmark = pytest.mark.slow

ALPHABET = [*"abc AB \n\t", "  ", "\u2581", "é", "漢", "🙂", "ﬁ", "½", "\0", "\x7f", "\u0301",
            "</s>", "<unk>", "<0x41>", "<mark>", "\r\n", "\u200b", "\ufeff"]  # fmt: skip
WAYS = [
    dict(zip(("normalization_rule_name", "add_dummy_prefix", "remove_extra_whitespaces",
              "byte_fallback", "treat_whitespace_as_suffix"), values, strict=True))
    for values in itertools.product(("identity", "nmt_nfkc"), *[(False, True)] * 4)
]  # fmt: skip


def texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(ALPHABET, k=draw.randint(0, 30))) for _ in range(count)]


def made(folder: Path, kind: str, way: dict[str, Any]) -> SentencePieceTokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([one.replace("\0", "") for one in texts(300, 1)]),
        model_writer=model, model_type=kind, vocab_size=300, character_coverage=0.98,
        hard_vocab_limit=False, user_defined_symbols=["<mark>"], minloglevel=2, **way,
    )  # fmt: skip
    path = folder / "some.model"
    path.write_bytes(model.getvalue())
    return SentencePieceTokenizer(path)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_what_is_spelt_is_decoded(kind: str, tmp_path: Path) -> None:
    seen = 0
    for way in WAYS:
        tokenizer = made(tmp_path, kind, way)
        every = texts(200)
        for text, ids in zip(every, tokenizer.encode(every), strict=True):
            comes_back = tokenizer.decode(ids) == text
            spelt = tokenizer.spells(ids, text.encode())
            assert comes_back or not spelt, (way, text)
            if way == WAYS[2]:  # identity, byte fallback, nothing added or removed: as ours
                assert spelt == comes_back and comes_back, text
            seen += spelt
            for other in (text + " ", text[:-1], text[::-1]):
                if tokenizer.spells(ids, other.encode()):
                    assert tokenizer.decode(ids) == other, (way, text, other)
    assert seen >= 200


def test_the_account_is_that_of_the_decoder(tmp_path: Path) -> None:
    for way in WAYS[:6]:
        tokenizer = made(tmp_path, "unigram", way)
        every = texts(300)
        ids = tokenizer.encode(every)
        found = account_of(tokenizer, every, ids)
        tokenizer.spells = lambda ids, text: False  # type: ignore[method-assign]
        assert found == account_of(tokenizer, every, ids)


@pytest.mark.parametrize("kind", ["unigram", "bpe", "char"])
def test_a_model_file_is_read_as_protobuf_reads_it(kind: str, tmp_path: Path) -> None:
    described = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    for way in WAYS:
        made(tmp_path, kind, way)
        data = (tmp_path / "some.model").read_bytes()
        wanted = described.ModelProto()
        wanted.ParseFromString(data)
        found = read_model(data)
        trainer, norm = wanted.trainer_spec, wanted.normalizer_spec
        assert found.pieces == [Piece(one.piece, one.score, one.type) for one in wanted.pieces]
        assert (found.kind, found.byte_fallback, found.space_after) == (
            trainer.model_type, trainer.byte_fallback, trainer.treat_whitespace_as_suffix
        )  # fmt: skip
        assert found.normalization == norm.name
        assert (found.adds_space, found.removes_spaces, found.escapes_spaces) == (
            norm.add_dummy_prefix, norm.remove_extra_whitespaces, norm.escape_whitespaces
        )  # fmt: skip
        assert found.changes_decoded == bool(wanted.denormalizer_spec.precompiled_charsmap)


def test_what_is_cut_is_refused(tmp_path: Path) -> None:
    made(tmp_path, "unigram", WAYS[0])
    data = (tmp_path / "some.model").read_bytes()
    draw = random.Random(0)
    for _ in range(300):
        damaged = bytearray(data[: draw.randint(1, len(data))])
        for _ in range(draw.randint(0, 3)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        with contextlib.suppress(DataError):
            read_model(bytes(damaged))
        (tmp_path / "damaged.model").write_bytes(bytes(damaged))
        with contextlib.suppress(DataError):
            load_tokenizer(tmp_path / "damaged.model")


def test_no_verb_needs_protobuf(tmp_path: Path) -> None:
    """Nothing installs it: what a model says of itself is read without it."""
    made(tmp_path, "unigram", WAYS[2])
    code = f"""
import sys
sys.modules["google"] = sys.modules["google.protobuf"] = None
from pathlib import Path
from data_pipeline.fast_tokenizer import fast_tokenizer, special_names
from data_pipeline.tokenizer import load_tokenizer
path = Path({str(tmp_path / "some.model")!r})
tokenizer = load_tokenizer(path)
assert tokenizer.spells(tokenizer.encode(["a b"])[0], b"a b")
print(tokenizer.causes(), special_names(path, tokenizer), fast_tokenizer(path, []) is not None)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

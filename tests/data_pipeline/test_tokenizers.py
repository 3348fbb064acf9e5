"""Foreign tokenizers: every text comes back, or what is lost is said and counted."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import normalizers, processors

from data_pipeline.encode import EncodingSettings
from data_pipeline.json_tokenizer import SpecialTokens
from data_pipeline.manifest import load_manifest
from data_pipeline.prepare import tokenize_sources
from data_pipeline.records import DataError
from data_pipeline.tokenizer import load_tokenizer
from tests.conftest import make_text, write_jsonl
from tests.tokenizer_files import EOD, FILLED, TEXTS, byte_level, ids_of, write_texts
from tests.tools import assert_one_line, run


def test_settings_for_inputs_do_not_change_documents(tmp_path: Path) -> None:
    """Truncation, padding, dropout and tokens put around a text, in every combination."""
    made = byte_level(tmp_path / "plain.json")
    plain = [load_tokenizer(tmp_path / "plain.json").encode(TEXTS)]
    around = [
        processors.BertProcessing((EOD, 0), ("<|padding|>", 1)),
        processors.RobertaProcessing((EOD, 0), ("<|padding|>", 1)),
        processors.TemplateProcessing(
            single=f"<|padding|> $A {EOD}", special_tokens=[(EOD, 0), ("<|padding|>", 1)]
        ),
        None,
    ]
    for cut, pad, dropout, post in itertools.product((0, 8), (0, 1), (None, 0.5), around):
        one = tokenizers.Tokenizer.from_str(made.to_str())
        if cut:
            one.enable_truncation(cut)
        if pad:
            one.enable_padding(pad_id=1, pad_token="<|padding|>", length=64)
        if post is not None:
            one.post_processor = post
        tree = json.loads(one.to_str())
        tree["model"]["dropout"] = dropout
        path = tmp_path / "other.json"
        path.write_text(json.dumps(tree))
        found = load_tokenizer(path)
        assert [ids.tolist() for ids in found.encode(TEXTS)] == [one.tolist() for one in plain[0]]
        off = next((one for one in found.notes if one.startswith("switched off")), "")
        assert ("truncation to 8" in off, "padding" in off) == (bool(cut), bool(pad))
        assert ("dropout" in off) == bool(dropout)
        assert ("post-processor" in " ".join(found.notes)) == (post is not None)


def test_tokens_around_a_text_on_request(tmp_path: Path) -> None:
    """They are added once, and are no part of the text that comes back; the end stays one token."""
    made = byte_level(tmp_path / "plain.json")
    begin, end = ("<|padding|>", 1), (EOD, 0)
    for template, before in ((f"<|padding|> $A {EOD}", 1), ("<|padding|> $A", 1), (f"$A {EOD}", 0)):
        made.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[begin, end]
        )
        made.save(str(tmp_path / "template.json"))
        out = tmp_path / f"out-{before}-{len(template)}"
        report = tokenize_sources(
            [str(write_texts(tmp_path / "in"))], tmp_path / "template.json", out,
            special=SpecialTokens(add=True),
        )  # fmt: skip
        plain = load_tokenizer(tmp_path / "plain.json").encode(FILLED)
        wanted = sorted([1] * before + one.tolist() for one in plain)
        assert sorted(ids_of(out)) == wanted
        assert report.manifest["round_trip"]["exact"] == len(FILLED)
        assert report.manifest["tokenizer"]["special"] == {"add": True, "parse": False}


@pytest.mark.parametrize("parse", [False, True])
def test_a_special_token_in_a_text(
    parse: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stays text, or becomes the token on request; either way it is said and counted."""
    byte_level(tmp_path / "plain.json")
    source = write_texts(tmp_path / "in", [*FILLED, f"{EOD}{EOD}<|padding|>"])
    report = tokenize_sources(
        [str(source)], tmp_path / "plain.json", tmp_path / "out",
        special=SpecialTokens(parse=parse),
    )  # fmt: skip
    account = report.manifest["round_trip"]
    assert (account["special_texts"], account["special_documents"]) == (4, 2)
    assert (account["eod_inside"], account["eod_documents"]) == ((3, 2) if parse else (0, 0))
    assert account["exact"] == len(FILLED) + 1
    said = capsys.readouterr().err
    assert "text of special tokens: 4 times, in 2 documents" in said
    assert (f"{EOD} inside texts: 3 times" in said) == parse
    with pytest.raises(DataError, match="special tokens"):
        tokenize_sources(
            [str(source)], tmp_path / "plain.json", tmp_path / "out",
            special=SpecialTokens(parse=not parse),
        )  # fmt: skip


def test_a_lossy_tokenizer_is_said_and_can_be_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = byte_level(tmp_path / "plain.json")
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    made.save(str(tmp_path / "lossy.json"))
    words = ["data", "tokenize", str(write_texts(tmp_path / "in")), "--workers", "1",
             "--tokenizer", str(tmp_path / "lossy.json"), "--out"]  # fmt: skip
    assert run(monkeypatch, *words, str(tmp_path / "out")) == 0
    said = capsys.readouterr().err
    assert "round trip: 3 of 7 documents come back exactly" in said, said
    assert "comes back as 'the quick" in said and "NFKC, normalizer Lowercase" in said
    assert run(monkeypatch, *words, str(tmp_path / "none"), "--lossless") == 1
    assert_one_line(capsys.readouterr().err, ("--lossless", "lossy.json", "comes back as"))
    assert not (tmp_path / "none/manifest.json").exists()
    assert load_manifest(tmp_path / "out").entries[0].bytes == sum(len(t.encode()) for t in FILLED)


def test_unknown_tokens_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A SentencePiece model of another language, without byte fallback."""
    import io

    import sentencepiece

    model = io.BytesIO()
    rng = random.Random(0)
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([make_text(rng, 3).replace("🙂", "") for _ in range(80)]),
        model_writer=model, vocab_size=120, model_type="bpe", minloglevel=2,
    )  # fmt: skip
    (tmp_path / "foreign.model").write_bytes(model.getvalue())
    texts = ["rank decay of the matrix", "Привет, мир", "漢 字"]
    tokenize_sources(
        [str(write_texts(tmp_path / "in", texts))], tmp_path / "foreign.model", tmp_path / "out"
    )
    flat = [token for one in ids_of(tmp_path / "out") for token in one]
    account = json.loads((tmp_path / "out/manifest.json").read_text())["round_trip"]
    assert account["unknown"] == flat.count(0) > 0 and account["tokens"] == len(flat)
    assert (account["unknown_documents"], account["exact"]) == (2, 1)
    said = capsys.readouterr().err
    assert f"unknown tokens: {account['unknown']} of {len(flat)}" in said
    assert "normalisation nmt_nfkc" in said and "no byte fallback" in said


def test_the_account_does_not_depend_on_workers_or_kills(tmp_path: Path) -> None:
    from data_pipeline.sources import find_sources
    from data_pipeline.tokenize import tokenize

    made = byte_level(tmp_path / "plain.json")
    made.normalizer = normalizers.Lowercase()
    made.save(str(tmp_path / "lossy.json"))
    for name in ("a", "b", "c"):
        write_jsonl(
            tmp_path / "in" / f"{name}.jsonl",
            [{"text": f"{name} {text}", "meta": {"pile_set_name": "Web"}} for text in FILLED],
        )
    sources = find_sources([str(tmp_path / "in")])
    settings = EncodingSettings(tmp_path / "lossy.json", split="train")
    whole = tokenize(sources, settings, tmp_path / "whole").manifest["round_trip"]

    class KilledError(Exception):
        pass

    calls = []

    def kill(_: int, __: int) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KilledError

    with pytest.raises(KilledError):
        tokenize(sources, settings, tmp_path / "parts", progress=kill, part_bytes=1)
    resumed = tokenize(sources, settings, tmp_path / "parts", part_bytes=1)
    assert resumed.resumed and resumed.manifest["round_trip"] == whole
    assert whole["documents"] == 21 and 0 < whole["exact"] < 21

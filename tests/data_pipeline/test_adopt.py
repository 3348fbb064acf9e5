"""Tokens of Megatron-LM and GPT-NeoX, made by Megatron's own builder, trained on as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch

from data_pipeline.adopt import _byte_level, adopt
from data_pipeline.dataset import TrainingData, held_out
from data_pipeline.light_imports import import_light
from data_pipeline.manifest import load_manifest
from data_pipeline.sources import DataError
from data_pipeline.tokenizer import load_tokenizer
from tests.conftest import make_text
from tests.tools import base_recipe, pretrain, run, write_recipe

EOD = "<|endoftext|>"


def texts(count: int = 120) -> list[str]:
    import random

    rng = random.Random(3)
    return [make_text(rng, rng.randint(2, 12)) for _ in range(count)]


@pytest.fixture(scope="module")
def gpt2_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer as GPT-2's two files; returns vocab.json."""
    folder = tmp_path_factory.mktemp("gpt2")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(texts(), vocab_size=400, special_tokens=[EOD], show_progress=False)
    made.save_model(str(folder))
    return folder / "vocab.json"


def write_pair(prefix: Path, documents: list[list[int]], dtype: type = np.uint16) -> None:
    """As preprocess_data.py writes it."""
    (indexed,) = import_light("megatron.core.datasets.indexed_dataset")
    builder = indexed.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for tokens in documents:
        builder.add_document(torch.tensor(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")


def encoded(vocabulary: Path) -> list[list[int]]:
    made = tokenizers.ByteLevelBPETokenizer(
        str(vocabulary), str(vocabulary.with_name("merges.txt"))
    )
    eod = made.token_to_id(EOD)
    return [[*made.encode(text).ids, eod] for text in texts()]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_documents(gpt2_files: Path, tmp_path: Path, dtype: type) -> None:
    """Held-out documents have the bytes of their text; training sees the others' tokens alone."""
    documents = encoded(gpt2_files)
    write_pair(tmp_path / "pile_text_document", documents, dtype)
    told = adopt([tmp_path / "pile_text_document"], gpt2_files, tmp_path / "out", (90, 5, 5))
    assert "120 documents (120 of 120 looked at end in eod)" in told[0]
    manifest = load_manifest(tmp_path / "out")
    assert [(e.split, e.subset, e.documents) for e in manifest.entries] == [
        ("train", "pile", 108), ("val", "pile", 6), ("test", "pile", 6)
    ]  # fmt: skip
    found = held_out(manifest, "test")
    decode = load_tokenizer(manifest.tokenizer).decode
    assert [decode([int(t) for t in one.tokens]) for one in found] == texts()[114:]
    assert [one.bytes for one in found] == [len(text.encode()) for text in texts()[114:]]
    data = TrainingData(manifest, "proportional", 16, 1, 40)
    flat = np.concatenate([np.array(one) for one in documents[:108]])
    seen = {tuple(data[number][0][:8]) for number in range(40)}
    windows = {tuple(flat[i : i + 8]) for i in range(len(flat) - 8)}
    # Samples run over the ends of shuffled documents; most lie inside one.
    assert sum(one in windows for one in seen) > 0.6 * len(seen)
    last = {tuple(np.array(one)[:8]) for one in documents[108:]}
    assert not seen & last


def test_names_lead_nowhere_else(gpt2_files: Path, tmp_path: Path) -> None:
    """A subset of any name has files of its own, inside the folder."""
    write_pair(tmp_path / "pile", encoded(gpt2_files))
    for number, name in enumerate(["../../esc/x", "/esc/y", "a/b", "..", "con", "é" * 200, "x"]):
        out = tmp_path / "deep" / "er" / str(number)
        before = {one for one in tmp_path.rglob("*") if out not in one.parents}
        adopt([tmp_path / "pile"], gpt2_files, out, (90, 5, 5), [name])
        after = {one for one in tmp_path.rglob("*") if out not in one.parents}
        assert after - before <= {out, *out.parents}
        manifest = load_manifest(out)
        assert {entry.subset for entry in manifest.entries} == {name}
        for split, some in (("val", texts()[108:114]), ("test", texts()[114:])):
            assert [one.bytes for one in held_out(manifest, split)] == [
                len(x.encode()) for x in some
            ]


def test_held_out_documents_are_not_trained_on(gpt2_files: Path, tmp_path: Path) -> None:
    """Document i is made of token i alone: a whole epoch shows whose tokens were seen."""
    eod = encoded(gpt2_files)[0][-1]
    own = [token for token in range(121) if token != eod][:120]
    write_pair(tmp_path / "pile", [[token] * 20 + [eod] for token in own])
    adopt([tmp_path / "pile"], gpt2_files, tmp_path / "out", (90, 5, 5), packed=False)
    count = 108 * 21 // 16
    data = TrainingData(load_manifest(tmp_path / "out"), "proportional", 16, 1, count)
    seen = {int(token) for number in range(count) for token in data[number][0]} - {eod}
    assert len(seen) > 100 and not seen & set(own[108:])


@pytest.mark.slow
def test_trains_and_is_scored(gpt2_files: Path, tmp_path: Path) -> None:
    write_pair(tmp_path / "a_text_document", encoded(gpt2_files)[:70])
    write_pair(tmp_path / "b_text_document", encoded(gpt2_files)[70:])
    prefixes = [str(tmp_path / name) for name in ("a_text_document", "b_text_document")]
    words = ["--tokenizer", str(gpt2_files), "--out", str(tmp_path / "out"), "--split", "8,1,1"]
    done = pretrain("data", "adopt", *prefixes, *words)
    assert done.returncode == 0, done.stderr
    recipe = write_recipe(tmp_path / "recipe.yaml", base_recipe(tmp_path / "out"))
    done = pretrain("train", str(recipe), "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert set(figures["subsets"]) == {"a", "b"} and figures["overall"]["bits_per_byte"] > 0


def test_packed_samples_are_taken_in_their_order(gpt2_files: Path, tmp_path: Path) -> None:
    """Pythia's preshuffled Pile: sequence i is sample i."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 300, (50, 33))
    write_pair(tmp_path / "pile", rows.tolist())
    told = adopt([tmp_path / "pile"], gpt2_files, tmp_path / "out", (100, 0, 0))
    assert told == ["pile: 50 samples of 33 tokens, taken in their order: train with model.context "
                    "32"]  # fmt: skip
    data = TrainingData(load_manifest(tmp_path / "out"), "proportional", 32, 1, 120)
    for number in (0, 1, 17, 49, 50, 119):
        inputs, labels = data[number]
        assert (inputs == rows[number % 50][:-1]).all() and (labels == rows[number % 50][1:]).all()
    with pytest.raises(DataError, match=r"set model\.context to 32"):
        TrainingData(load_manifest(tmp_path / "out"), "proportional", 16, 1, 10)
    adopt([tmp_path / "pile"], gpt2_files, tmp_path / "loose", (90, 5, 5), packed=False)
    assert all(entry.packed == 0 for entry in load_manifest(tmp_path / "loose").entries)


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        (["{none}", "--tokenizer", "{vocab}"], "none.idx: missing; give the common PREFIX"),
        (["{cut}", "--tokenizer", "{vocab}"], "cut.bin: "),
        (["{pair}", "--tokenizer", "{vocab}", "--split", "1,2"], "--split: '1,2' is not three"),
        (["{pair}", "--tokenizer", "{vocab}", "--packed"], "its sequences differ in length"),
        (["{big}", "--tokenizer", "{vocab}"], "has token 900"),
        (["{pair}", "{pair}", "--tokenizer", "{vocab}"], "different names"),
        (["{pair}", "{wide}", "--tokenizer", "{vocab}"], "different types"),
        (["{pair}", "--tokenizer", "{folder}/no.json"], "no such tokenizer"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], culprit: str, gpt2_files: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    documents = encoded(gpt2_files)[:10]
    write_pair(tmp_path / "pair", documents)
    write_pair(tmp_path / "wide", documents, np.int32)
    write_pair(tmp_path / "big", [[900, 1], [2, 3, 4]])
    write_pair(tmp_path / "cut", documents)
    content = (tmp_path / "cut.bin").read_bytes()
    (tmp_path / "cut.bin").write_bytes(content[:-10])
    names = {name: str(tmp_path / name) for name in ("pair", "wide", "big", "cut", "none")}
    filled = [word.format(**names, vocab=gpt2_files, folder=tmp_path) for word in words]
    assert run(monkeypatch, "data", "adopt", *filled, "--out", str(tmp_path / "out")) != 0
    text = capsys.readouterr().err
    assert culprit in text and "Traceback" not in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("odd", [
    10**12, 2**32 - 1, 2**31, -1, 1.5, True, None, "x", [1], {"a": 1}, "the same", "a list", "cut",
])  # fmt: skip
@pytest.mark.parametrize("all_of_them", [True, False])
def test_a_vocabulary_with_other_ids(
    odd: Any, all_of_them: bool, gpt2_files: Path, tmp_path: Path
) -> None:
    """The library would abort the process at some of them."""
    for file in gpt2_files.parent.iterdir():
        shutil.copy(file, tmp_path)
    values = json.loads(gpt2_files.read_text())
    names = list(values)[:: 1 if all_of_them else 50]
    text = json.dumps(values | dict.fromkeys(names, 7 if odd == "the same" else odd))
    if odd in ("a list", "cut"):
        text = json.dumps(names) if odd == "a list" else text[:-40]
    (tmp_path / "vocab.json").write_text(text)
    with pytest.raises(DataError, match=r"vocab\.json: not GPT-2's vocabulary \(") as caught:
        _byte_level(tmp_path / "vocab.json", tmp_path / "merges.txt", None)
    assert "\n" not in str(caught.value)

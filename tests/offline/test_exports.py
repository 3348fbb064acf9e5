"""What stands beside exported weights: ids of special tokens, and the tokenizer as it was used."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import processors

from data_pipeline.dataset import held_out
from data_pipeline.fast_tokenizer import fast_tokenizer
from data_pipeline.json_tokenizer import SpecialTokens
from data_pipeline.manifest import Manifest, load_manifest
from data_pipeline.prepare import tokenize_sources
from data_pipeline.tokenizer import load_tokenizer, train_tokenizer
from pretrain.checkpoint.manifest import MANIFEST, sealed
from pretrain.checkpoint.reader import list_checkpoints
from pretrain.offline.tokenizer_files import write_tokenizer
from tests.tokenizer_files import EOD, TEXTS, byte_level, write_texts
from tests.tools import assert_one_line, base_recipe, run, write_recipe
from tests.transformers_models import transformers

VOCABULARY = 500
SHAPES: dict[str, dict[str, Any]] = {
    kind: {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 32, "vocab_size": VOCABULARY,
    }
    for kind in ("gpt_neox", "llama", "qwen3")
}  # fmt: skip
SHAPES["qwen3"] |= {"head_dim": 16, "num_key_value_heads": 2}
SHAPES["gpt2"] = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32,
                  "vocab_size": VOCABULARY}  # fmt: skip
SHAPES["smollm3"] = SHAPES["llama"] | {"no_rope_layers": [0], "pad_token_id": 3}
KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id")


def make_ids(rng: random.Random) -> dict[str, Any]:
    """Some keys missing, some null, some lists."""
    found: dict[str, Any] = {}
    for key in KEYS:
        kind = rng.choice(["missing", "null", "one", "many"])
        if kind == "null":
            found[key] = None
        elif kind == "many" and key == "eos_token_id":
            found[key] = rng.sample(range(VOCABULARY), 3)
        elif kind != "missing":
            found[key] = rng.randrange(VOCABULARY)
    return found


def foreign(folder: Path, kind: str, rng: random.Random, with_generation: bool) -> dict[str, Any]:
    """A model of `transformers` whose files say random ids; returns what config.json says."""
    config = transformers.AutoConfig.for_model(kind, **SHAPES[kind])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    values = {key: value for key, value in values.items() if not key.endswith("_token_id")}
    ids = make_ids(rng)
    if kind == "smollm3":  # the class's own is beyond a small vocabulary
        ids["pad_token_id"] = rng.randrange(VOCABULARY)
    (folder / "config.json").write_text(json.dumps(values | ids))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if with_generation:
        others = make_ids(rng) | {"temperature": 0.6, "suppress_tokens": [4, 5]}
        (folder / "generation_config.json").write_text(json.dumps(others))
    return ids


def ids_of(folder: Path) -> dict[str, Any]:
    values = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in values.items() if key.endswith("_token_id")}


def as_transformers_reads(folder: Path) -> tuple[list[Any], dict[str, Any]]:
    config = transformers.AutoConfig.from_pretrained(folder)
    try:
        generation = transformers.GenerationConfig.from_pretrained(folder).to_dict()
    except OSError:
        generation = {}
    generation.pop("transformers_version", None)
    return [getattr(config, key, None) for key in KEYS], generation


# --- ids ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPES)
def test_ids_of_an_imported_model_come_out_as_they_were(
    kind: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that are missing stay missing; generation_config.json is the same too."""
    recipe = write_recipe(tmp_path / "recipe.yaml", base_recipe(data))
    for number, with_generation in enumerate((False, True, True)[: 3 if kind == "llama" else 1]):
        rng = random.Random(f"{kind}{number}")
        theirs, out = tmp_path / f"theirs{number}", tmp_path / f"out{number}"
        ids = foreign(theirs, kind, rng, with_generation)
        imported = tmp_path / f"run{number}"
        assert run(monkeypatch, "import", str(theirs), str(recipe), "--out", str(imported)) == 0
        assert run(monkeypatch, "export", str(imported), "--out", str(out)) == 0
        assert ids_of(out) == ids
        assert as_transformers_reads(out) == as_transformers_reads(theirs)
        assert (out / "generation_config.json").exists() == with_generation


def test_ids_go_through_every_later_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Import, train, go on, fork: the export of each has the model's own ids."""
    ids = foreign(tmp_path / "theirs", "llama", random.Random(3), True)
    values = base_recipe(data)
    values["train"]["steps"] = 4
    values["ranks"] = {"every": 10}
    recipe = write_recipe(tmp_path / "recipe.yaml", values)
    first, fork = tmp_path / "first", tmp_path / "fork"
    words = ["import", str(tmp_path / "theirs"), str(recipe), "--out", str(first)]
    assert run(monkeypatch, *words) == 0
    config = str(first / "config.yaml")
    assert run(monkeypatch, "train", config, "--out", str(first), "--until", "1") == 0
    assert run(monkeypatch, "train", config, "--out", str(first), "--until", "2") == 0
    words = ["train", config, "--out", str(fork), "--fork", str(first), "--until", "3"]
    assert run(monkeypatch, *words) == 0
    for number, path in enumerate((first, fork)):
        out = tmp_path / f"out{number}"
        capsys.readouterr()
        assert run(monkeypatch, "export", str(path), "--out", str(out)) == 0
        assert ids_of(out) == ids
        assert as_transformers_reads(out) == as_transformers_reads(tmp_path / "theirs")
        assert "imported, and trained on" in (out / "README.md").read_text()
        assert "documents of the run end with 1" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["</s>", 1.5, True, [1, "x"], {}])
def test_what_is_no_id_is_named(
    file: str, value: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    foreign(tmp_path / "theirs", "llama", random.Random(0), True)
    path = tmp_path / "theirs" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": value}))
    recipe = write_recipe(tmp_path / "recipe.yaml", base_recipe(data))
    words = ["import", str(tmp_path / "theirs"), str(recipe), "--out", str(tmp_path / "run")]
    assert run(monkeypatch, *words) == 2
    assert_one_line(capsys.readouterr().err, (file, "eos_token_id", "not a token id"))


# --- away from the data ---------------------------------------------------------------------


def as_earlier_version(run_folder: Path) -> None:
    """Take the key out of the newest checkpoint's state that earlier versions did not write."""
    file = list_checkpoints(run_folder / "checkpoints")[-1] / MANIFEST
    values = json.loads(file.read_text())
    del values["state"]["eod"]
    values = {key: value for key, value in values.items() if key != "sha256"}
    file.write_bytes(sealed(values))


def test_away_from_its_data(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The end of documents is known, or asked for; never taken to be 0."""
    shutil.copytree(data, tmp_path / "data")
    recipe = base_recipe(tmp_path / "data")
    recipe["train"]["steps"] = 1
    path, own = tmp_path / "run", load_manifest(data).eod
    words = ["train", str(write_recipe(tmp_path / "recipe.yaml", recipe)), "--out", str(path)]
    assert run(monkeypatch, *words) == 0 and own != 0
    (tmp_path / "data").rename(tmp_path / "moved")

    def exported(name: str, *more: str) -> tuple[int, str]:
        capsys.readouterr()
        code = run(monkeypatch, "export", str(path), "--out", str(tmp_path / name), *more)
        found = capsys.readouterr()
        return code, found.out + found.err

    code, said = exported("away")
    assert code == 0 and "no tokenizer" in said
    assert ids_of(tmp_path / "away") == {
        "bos_token_id": own, "eos_token_id": own, "pad_token_id": None
    }  # fmt: skip
    code, said = exported("there", "--data", str(tmp_path / "moved"))
    assert code == 0 and "tokenizer.json and tokenizer.model" in said
    assert ids_of(tmp_path / "there") == ids_of(tmp_path / "away")
    # Data of another tokenizer, and of another end of document, at the same place.
    byte_level(tmp_path / "plain.json")
    tokenize_sources([str(write_texts(tmp_path / "in"))], tmp_path / "plain.json",
                     tmp_path / "data")  # fmt: skip
    code, said = exported("other")
    assert code == 0 and "another tokenizer or end-of-document" in said
    assert ids_of(tmp_path / "other") == ids_of(tmp_path / "away")
    code, said = exported("refused", "--data", str(tmp_path / "data"))
    assert code == 2 and not (tmp_path / "refused").exists()
    assert_one_line(said, ("--data", "another tokenizer"))
    # A checkpoint of an earlier version.
    as_earlier_version(path)
    code, said = exported("nowhere")
    assert code == 2 and not (tmp_path / "nowhere").exists()
    assert_one_line(said, ("state.eod", "--data"))
    code, said = exported("found", "--data", str(tmp_path / "moved"))
    assert code == 0 and ids_of(tmp_path / "found") == ids_of(tmp_path / "away")


# --- tokenizers -----------------------------------------------------------------------------


def write_varied(
    path: Path, cut: bool, pad: bool, dropout: float | None, post: str, end: str
) -> str:
    """A tokenizer with settings for inputs; returns the token that ends documents."""
    made = byte_level(path)
    if end == "added":
        made.add_tokens(["XEND"])
    if cut:
        made.enable_truncation(4)
    if pad:
        made.enable_padding(pad_id=1, pad_token="<|padding|>", length=64)
    around = {"start": "<|padding|> $A", "both": f"<|padding|> $A {EOD}"}
    if post in around:
        made.post_processor = processors.TemplateProcessing(
            single=around[post], special_tokens=[(EOD, 0), ("<|padding|>", 1)]
        )
    if post == "bytes":
        made.post_processor = processors.ByteLevel()
    tree = json.loads(made.to_str())
    tree["model"]["dropout"] = dropout
    path.write_text(json.dumps(tree))
    pieces = [one for one in tree["model"]["vocab"] if len(one) == 2 and one.isascii()]
    name: str = {"special": EOD, "added": "XEND", "piece": pieces[0]}[end]
    return name


def test_an_exported_tokenizer_encodes_as_the_run_did(tmp_path: Path) -> None:
    """Truncation, padding, dropout, tokens around a text, special tokens in texts, named ends."""
    everything = list(itertools.product(
        (False, True), (False, True), (None, 0.5), ("none", "bytes", "start", "both"),
        ("special", "added", "piece"), (False, True), (False, True),
    ))  # fmt: skip
    chosen = random.Random(2).sample(everything, 30)
    for number, (cut, pad, dropout, post, end, add, parse) in enumerate(chosen):
        source, folder = tmp_path / "tokenizer.json", tmp_path / str(number)
        folder.mkdir()
        name = write_varied(source, cut, pad, dropout, post, end)
        special = SpecialTokens(add, parse)
        used = load_tokenizer(source, name, special)
        manifest = Manifest(
            tmp_path, (), used.vocabulary_size, used.eod, source, used.sha256, "uint16", 0,
            special=special,
        )  # fmt: skip
        told = write_tokenizer(folder, manifest, 64, pad=1).described
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert theirs.eos_token_id == theirs.bos_token_id == used.eod
        assert theirs.pad_token_id == 1
        text = [*TEXTS, f"a{name}b {name} <|padding|>", "a long text that goes on " * 9]
        for one in text:
            found, wanted = theirs(one)["input_ids"], used.encode([one])[0].tolist()
            if post == "both" and add:
                assert found.pop() == 0  # whoever ends documents adds it, here the template
                wanted = wanted[:-1] if end != "special" else wanted
            if "other tokens" in told and name in one:
                continue  # it was said
            assert found == wanted, (one, chosen[number])
        # `transformers` takes the end of documents for special, the file did not.
        if end == "special" or not parse:
            assert ("other tokens" in told) == (end == "added")
        tree = json.loads((folder / "tokenizer.json").read_text())
        assert tree["truncation"] is tree["padding"] is tree["model"]["dropout"] is None


def test_the_named_end_of_documents_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer without any usual end, named with --eod-token, from data to export."""
    made = tokenizers.Tokenizer.from_str(
        byte_level(tmp_path / "plain.json").to_str().replace(EOD, "<|stop|>")
    )
    made.save(str(tmp_path / "stop.json"))
    texts = [text * 20 for text in TEXTS if text]
    for split in ("train", "val"):
        folder = write_texts(tmp_path / split, texts)
        (folder / "train.jsonl").rename(folder / f"{split}.jsonl.moved")
        (tmp_path / "in").mkdir(exist_ok=True)
        (folder / f"{split}.jsonl.moved").rename(tmp_path / "in" / f"{split}.jsonl")
    words = [
        "data",
        "tokenize",
        str(tmp_path / "in"),
        "--tokenizer",
        str(tmp_path / "stop.json"),
        "--eod-token",
        "<|padding|>",
        "--workers",
        "1",
        "--out",
        str(tmp_path / "data"),
    ]
    assert run(monkeypatch, *words) == 0
    recipe = base_recipe(tmp_path / "data")
    recipe["train"]["steps"] = 1
    words = ["train", str(write_recipe(tmp_path / "recipe.yaml", recipe)), "--out"]
    assert run(monkeypatch, *words, str(tmp_path / "run")) == 0
    assert run(monkeypatch, "export", str(tmp_path / "run"), "--out", str(tmp_path / "hf")) == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.eos_token == "<|padding|>" and theirs.eos_token_id == 1
    assert ids_of(tmp_path / "hf")["eos_token_id"] == 1


# --- conversions ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_converted_tokenizer_gives_the_same_tokens(kind: Any, data: Path, tmp_path: Path) -> None:
    manifest = load_manifest(data)
    decode = load_tokenizer(manifest.tokenizer).decode
    texts = [decode([int(t) for t in one.tokens]) for one in held_out(manifest, "train")]
    path = tmp_path / "some.model"
    path.write_bytes(train_tokenizer(texts, 350, kind))
    text = fast_tokenizer(path, texts).text
    assert text is not None
    (tmp_path / "tokenizer.json").write_text(text)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    slow = load_tokenizer(path)
    strange = ["a <unk> b </s>", "<0x41>", "tab\tand\n\n newline  🙂", "x" * 50, " \u2582 \u00a0"]
    for one in [*texts[:50], *strange]:
        ids = fast(one, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids == slow.encode([one])[0].tolist(), one
        assert fast.decode(ids, clean_up_tokenization_spaces=False) == one


def test_a_conversion_that_differs_is_not_written(tokenizer: Path) -> None:
    """The check itself: a text on which both differ (a literal space mark cannot be told)."""
    import data_pipeline.fast_tokenizer as module

    original = module._merges
    module._merges = lambda *words: original(*words)[::-1]
    try:
        assert fast_tokenizer(tokenizer, ["rank decay attention weight matrix"]).text is None
    finally:
        module._merges = original
    assert fast_tokenizer(tokenizer, ["rank decay attention weight matrix"]).text is not None

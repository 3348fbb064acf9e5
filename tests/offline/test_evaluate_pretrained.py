"""Models in Hugging Face's format, scored with their own tokenizer on text as it is."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.files import held
from data_pipeline.prepare import tokenize_sources
from data_pipeline.sources import Fields, find_sources, parse_block
from tests.conftest import write_jsonl
from tests.tokenizer_files import EOD, byte_level
from tests.tools import assert_one_line, base_recipe, run, write_recipe
from tests.transformers_models import transformers

CONTEXT = 24


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained run in Hugging Face's format."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    monkeypatch = pytest.MonkeyPatch()
    assert run(monkeypatch, "export", str(trained), "--out", str(folder)) == 0
    monkeypatch.undo()
    return folder


def score(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> dict[str, Any]:
    """The figures that a command writes."""
    assert run(monkeypatch, "evaluate", *words, "--out", str(out)) == 0
    figures: dict[str, Any] = json.loads(out.read_text())
    return figures


def same(one: dict[str, Any], other: dict[str, Any], tolerance: float = 1e-6) -> None:
    """Overall and per subset, of the same documents."""
    assert one["documents_sha256"] == other["documents_sha256"]
    assert one["subsets"].keys() == other["subsets"].keys()
    pairs = [(one["overall"], other["overall"])]
    pairs += [(one["subsets"][name], other["subsets"][name]) for name in one["subsets"]]
    for a, b in pairs:
        for key in ("documents", "bytes", "tokens"):
            assert a[key] == b[key], key
        for key in ("loss", "perplexity", "bits_per_byte"):
            assert a[key] == pytest.approx(b[key], rel=tolerance), key


@pytest.mark.slow
def test_an_export_scores_as_its_run(
    exported: Path, trained: Path, data: Path, corpus: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """On the tokens, on their decoded text, and on the raw files; whatever the batch."""
    ours = score(monkeypatch, tmp_path / "run.json", str(trained), "precision=fp32")
    bare = tmp_path / "bare"
    shutil.copytree(exported, bare)
    (bare / "tokenizer.model").unlink()  # so the data's tokens are not known to be its own
    hf = str(exported)
    for number, words in enumerate((
        (hf, "--data", str(data)), (str(bare), "--data", str(data)),
        (hf, "--data", str(corpus)), (hf, "--data", str(corpus / "test.jsonl.zst"), "--batch", "3"),
    )):  # fmt: skip
        found = score(monkeypatch, tmp_path / f"{number}.json", *words)
        same(found, ours)
        assert found["precision"] == "fp32" and found["split"] == "test"
    for words in (("--documents", "7"), ("--split", "val"), ("--stride", "8")):
        mine = score(monkeypatch, tmp_path / "a.json", str(trained), "precision=fp32", *words)
        same(score(monkeypatch, tmp_path / "b.json", hf, "--data", str(corpus), *words), mine)
    assert not list(exported.glob("evaluation*"))  # nothing is added to the model's folder


# --- models of others ---------------------------------------------------------------------------


def foreign(kind: str, folder: Path, texts: list[str], around: bool) -> Path:
    """A small model of a class, with a tokenizer that may put a token before every text."""
    torch.manual_seed(1)
    made = byte_level(folder / "tokenizer.json", texts)
    if around:
        made.post_processor = _template()
        made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EOD, "eos_token": EOD}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    shape = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT, "vocab_size": 300,
    }  # fmt: skip
    if kind != "gpt2":
        shape["intermediate_size"] = 48
    if kind in ("llama", "qwen3", "mistral", "gemma2", "olmo2"):
        shape["num_key_value_heads"] = 2
    of_kind: dict[str, dict[str, Any]] = {
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "gemma2": {"head_dim": 8},
        "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2,
                    "num_heads": 4},
    }  # fmt: skip
    more = of_kind.get(kind, {})
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    config = transformers.AutoConfig.for_model(kind, **shape, **more, **ids)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if kind == "opt":  # what a model on the Hub may bring
        (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
        values = json.loads((folder / "config.json").read_text())
        values["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
        (folder / "config.json").write_text(json.dumps(values))
    return folder


def _template() -> Any:
    from tokenizers import processors

    return processors.TemplateProcessing(single=f"{EOD} $A", special_tokens=[(EOD, 0)])


def rolling_nats(folder: Path, texts: list[str]) -> float:
    """lm-eval's rolling log-likelihood, from the model's logits (`loglikelihood_rolling`)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    total = 0.0
    for text in texts:
        tokens = [tokenizer.bos_token_id, *tokenizer.encode(text)]
        done = 1
        while done < len(tokens):
            stop = min(done + CONTEXT, len(tokens))
            start = 0 if done == 1 else stop - 1 - CONTEXT
            with torch.no_grad():
                logits = model(torch.tensor([tokens[start : stop - 1]])).logits[0].double()
            logits = logits[-(stop - done) :].log_softmax(-1)
            wanted = torch.tensor(tokens[done:stop])
            total -= float(logits.gather(1, wanted[:, None]).sum())
            done = stop
    return total


KINDS = (
    "gpt2",
    "gpt_neox",
    "llama",
    "qwen3",
    "mistral",
    "opt",
    "phi",
    "gemma2",
    "gpt_neo",
    "olmo2",
)


@pytest.mark.parametrize(
    ("kind", "around"),
    [
        pytest.param(kind, around, marks=() if (kind, around) in (("opt", True),)
                     else pytest.mark.long)
        for kind in KINDS for around in (True, False)
    ],
)  # fmt: skip
@pytest.mark.slow
def test_every_family_scores_as_in_lm_eval(
    kind: str, around: bool, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our model or that of transformers; a text with the name of a special token.

    Code that a model brings is not run.
    """
    texts = [
        document.text
        for source in find_sources([str(corpus / "test.jsonl.zst")])
        for block in source.open_blocks()
        for document in parse_block(block, Fields()).documents
    ][:12]
    texts += [f"a text that speaks of {EOD} in its middle", "x"]
    documents = tmp_path / "documents.jsonl"
    write_jsonl(documents, [{"text": text} for text in texts])
    folder = tmp_path / "model"
    folder.mkdir()
    foreign(kind, folder, texts, around)
    found = score(monkeypatch, tmp_path / "out.json", str(folder), "--data", str(documents))
    size = sum(len(text.encode()) for text in texts)
    assert found["overall"]["bytes"] == size and found["split"] == "all"
    assert not (folder / "ran").exists()
    bits = rolling_nats(folder, texts) / size / math.log(2)
    assert found["overall"]["bits_per_byte"] == pytest.approx(bits, rel=2e-5)


# --- several in one table -----------------------------------------------------------------------


@pytest.mark.slow
def test_ranks_and_revisions_in_one_table(
    exported: Path, trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    revisions = tmp_path / "revs"
    for name in ("step10", "step2", "other"):
        shutil.copytree(exported, revisions / name)
    shares = ("--attention-rank", "1,0.5,measured")
    words = [f"{revisions}@step*", str(trained), "precision=fp32", "--data", str(data), *shares]
    rows = score(monkeypatch, tmp_path / "out.json", *words)["evaluations"]
    names = [row["model"] for row in rows]
    assert names == ["step2"] * 3 + ["step10"] * 3 + ["run@6"] * 3
    assert [row["attention_rank"] for row in rows] == [1.0, 0.5, "measured"] * 3
    for first, second, third in zip(rows[:3], rows[3:6], rows[6:], strict=True):
        same(first, second, 0)
        same(first, third)
        assert first.get("attention_threshold") == third.get("attention_threshold")
    assert rows[0]["overall"]["loss"] != rows[1]["overall"]["loss"]
    printed = capsys.readouterr().out
    assert "rank kept" in printed and printed.count("measured") == 3
    assert run(monkeypatch, "ranks", f"{revisions}@step*", "--json") == 0
    assert list(json.loads(capsys.readouterr().out)["revisions"]) == ["step2", "step10"]
    assert run(monkeypatch, "evaluate", f"{revisions}@x*", "--data", str(data)) == 2
    assert_one_line(capsys.readouterr().err, ("no model in it matches x*", "step2, step10"))


@pytest.mark.parametrize(
    ("words", "culprits"),
    [
        (["{hf}"], ("--data", "files of text")),
        (["{hf}", "train.steps=3", "--data", "{data}"], ("train.steps=3", "has no recipe")),
        (["{hf}", "grid.pipeline_parallel=2", "--data", "{data}"], ("pipeline",)),
        (["{hf}", "--data", "{tmp}/no.jsonl"], ("no.jsonl", "no such file")),
        (["{hf}", "--data", "{data}", "--stride", "99"], ("--stride", "99")),
        (["{hf}", "--data", "{data}", "--attention-rank", "1,2"], ("--attention-rank", "2")),
        (["{bert}", "--data", "{data}"], ("model_type 'bert'", "causal", "llama")),
        (["{bare}", "--data", "{text}"], ("tokenizer.json", "save_pretrained")),
        (["{broken}", "--data", "{text}"], ("tokenizer.json", "not a Hugging Face")),
        (["{text}", "--data", "{data}"], ("has no checkpoint",)),
    ],
)
def test_what_cannot_be_scored_is_one_line(
    words: list[str], culprits: tuple[str, ...], exported: Path, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    places = {"hf": exported, "data": data, "tmp": tmp_path, "text": tmp_path / "text.jsonl"}
    write_jsonl(places["text"], [{"text": "a few words"}])
    for name in ("bert", "bare", "broken"):
        places[name] = tmp_path / name
        places[name].mkdir()
        for file in exported.iterdir():
            (places[name] / file.name).symlink_to(file)
    (places["bare"] / "tokenizer.json").unlink()
    (places["broken"] / "tokenizer.json").unlink()
    (places["broken"] / "tokenizer.json").write_text("{}")
    (places["bert"] / "config.json").unlink()
    (places["bert"] / "config.json").write_text('{"model_type": "bert"}')
    asked = [word.format(**places) for word in words]
    assert run(monkeypatch, "evaluate", *asked) in (1, 2)
    assert_one_line(capsys.readouterr().err, culprits)


# --- runs that were moved -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("small_figures")
def test_a_moved_run_finds_its_data(
    data: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The project is renamed, and the commands run elsewhere; other data there is not taken."""
    project = tmp_path / "project"
    shutil.copytree(data, project / "data" / "corpus")
    monkeypatch.chdir(project)
    recipe = base_recipe(Path("data/corpus"))
    recipe["train"]["steps"] = 1
    words = ["train", str(write_recipe(project / "r.yaml", recipe)), "--out", "runs/one"]
    assert run(monkeypatch, *words) == 0
    before = json.loads((project / "runs/one/evaluation.json").read_text())["overall"]
    project.rename(tmp_path / "renamed")
    monkeypatch.chdir("/")
    moved = tmp_path / "renamed" / "runs" / "one"
    assert run(monkeypatch, "evaluate", str(moved), "--documents", "6", "--split", "val",
               "--out", str(tmp_path / "after.json")) == 0  # fmt: skip
    after = json.loads((tmp_path / "after.json").read_text())["overall"]
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-6)
    assert run(monkeypatch, "export", str(moved), "--out", str(tmp_path / "hf")) == 0
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    report = ["report", str(moved), "--format", "md", "--out", str(tmp_path / "report.md")]
    assert run(monkeypatch, *report) == 0
    place = tmp_path / "renamed" / "data" / "corpus"
    shutil.copy(place / "tokenizer.model", tmp_path)
    shutil.rmtree(place)
    tokenize_sources([str(corpus / "test.jsonl.zst")], tmp_path / "tokenizer.model", place)
    capsys.readouterr()
    assert run(monkeypatch, "evaluate", str(moved)) == 2
    assert_one_line(capsys.readouterr().err, ("data/corpus",))


def test_a_text_under_another_key(
    exported: Path, trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    texts = [f"A text of {number} words, more or less." for number in range(5)]
    mine, other = tmp_path / "mine.jsonl", tmp_path / "other" / "mine.jsonl"
    write_jsonl(mine, [{"text": text} for text in texts])
    other.parent.mkdir()
    write_jsonl(other, [{"meta": {"body": text, "kind": "a"}} for text in texts])
    hf = str(exported)
    wanted = score(monkeypatch, tmp_path / "a.json", hf, "--data", str(mine))
    field = ("--text-field", "meta.body")
    same(score(monkeypatch, tmp_path / "b.json", hf, "--data", str(other), *field), wanted)
    kinds = ("--subset-field", "meta.kind")
    found = score(monkeypatch, tmp_path / "c.json", hf, "--data", str(other), *field, *kinds)
    assert set(found["subsets"]) == {"a"} and set(wanted["subsets"]) == {"mine"}
    for code, words, culprits in (
        (2, (hf, "--data", str(other)), (str(other), "'text'", "'meta.body'", "--text-field")),
        (2, (hf, "--data", str(data), *field), ("--text-field", str(data))),
        (2, (str(trained), *field), ("--text-field", "checkpoint")),
    ):  # fmt: skip
        capsys.readouterr()
        assert run(monkeypatch, "evaluate", *words) == code
        assert_one_line(capsys.readouterr().err, culprits)


def test_a_file_that_another_command_writes_is_refused(
    exported: Path, trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Before anything is scored, for one model or several, of any kind."""
    out, hf, ours = tmp_path / "out.json", str(exported), str(trained)
    scoring = ("pretrain.offline.evaluate.score", "pretrain.offline.pretrained.score")
    for words in (
        (ours,), (ours, ours), (ours, "--attention-rank", "1,0.5"), (hf, ours), (hf,), (hf, hf),
    ):  # fmt: skip
        with held(out), monkeypatch.context() as patched:
            for name in scoring:
                patched.setattr(name, lambda *_: pytest.fail("scored"))
            assert run(patched, "evaluate", *words, "--data", str(data), "--out", str(out)) == 1
        assert_one_line(capsys.readouterr().err, (str(out),))
    assert not out.exists()
    both = (ours, hf, "--data", str(data), "--documents", "2")
    assert run(monkeypatch, "evaluate", *both, "--out", str(out)) == 0
    assert len(json.loads(out.read_text())["evaluations"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]

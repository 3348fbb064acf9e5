"""To Hugging Face and back: weights, tokenizer, card; and what others compute of them."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.dataset import held_out
from data_pipeline.manifest import load_manifest
from data_pipeline.prepare import tokenize_sources, train_from_sources
from data_pipeline.tokenizer import load_tokenizer
from models.gpt import GPT
from models.layers import ParameterFactory
from models.roles import info_of
from pretrain.checkpoint.reader import Checkpoint, list_checkpoints
from pretrain.config.recipe import load_config
from pretrain.runs.metrics import read_metrics
from tests.tools import (
    DIALECTS,
    base_recipe,
    made_once,
    pretrain,
    run,
    train_models,
    write_recipe,
)
from tests.transformers_models import transformers

MODELS: dict[str, dict[str, Any]] = {
    **DIALECTS,
    "qwen3": {"dialect": "llama", "qk_norm": True, "head_dim": 16},
    "nope": {"dialect": "llama", "position": "none"},
}


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A trained run of every kind of model."""
    return train_models(tmp_path_factory.mktemp("runs"), data, MODELS)


@pytest.fixture(scope="module")
def exported(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    monkeypatch = pytest.MonkeyPatch()
    for name, path in runs.items():
        assert run(monkeypatch, "export", str(path), "--out", str(folder / name)) == 0
    monkeypatch.undo()
    return {name: folder / name for name in runs}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


# --- the exported folder ----------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_in_transformers(name: str, exported: dict[str, Path], data: Path) -> None:
    """Tokens as the pipeline's; the model writes text."""
    folder = exported[name]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    manifest = load_manifest(data)
    decode = load_tokenizer(manifest.tokenizer).decode
    for one in held_out(manifest, "test"):
        tokens = [int(token) for token in one.tokens]
        assert tokenizer(decode(tokens), add_special_tokens=False)["input_ids"] == tokens
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == manifest.eod
    assert model.config.eos_token_id == manifest.eod
    prompt = tokenizer("The rank of", return_tensors="pt")
    made = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert made.shape[1] > prompt["input_ids"].shape[1] and tokenizer.decode(made[0])


def test_the_card(exported: dict[str, Path], runs: dict[str, Path]) -> None:
    text = (exported["llama"] / "README.md").read_text()
    scores = json.loads((runs["llama"] / "evaluation.json").read_text())["overall"]
    config = load_config(runs["llama"] / "config.yaml")
    rates = math.fsum(config.learning_rate(step) for step in range(6))
    for part in (f"| query | 0.5 | {0.5 * rates:.4g} |", f"| mlp_in | 0.1 | {0.1 * rates:.4g} |",
                 "| norm | 0 | 0 |", "learning_rate: 0.01",
                 f"{scores['bits_per_byte']:.4f}", "6 updates", "Weight decay"):  # fmt: skip
        assert part in text, part


# --- and back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(
    name: str, exported: dict[str, Path], runs: dict[str, Path], data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Bitwise: our tensors, and theirs when exported again."""
    recipe = write_recipe(tmp_path / "recipe.yaml", base_recipe(data))
    words = ["import", str(exported[name]), str(recipe), "--out", str(tmp_path / "run")]
    assert run(monkeypatch, *words) == 0
    assert "which is not the" not in capsys.readouterr().err  # the tokenizer is the same
    (path,) = list_checkpoints(tmp_path / "run/checkpoints")
    back = Checkpoint(path)
    own = Checkpoint(list_checkpoints(runs[name] / "checkpoints")[-1])
    assert back.step == 0 and back.parameters.keys() == own.parameters.keys()
    rows = own.config.model.vocabulary_size
    for one in own.parameters:
        a, b = back.full(one), own.full(one)
        if one in ("embedding.weight", "head.weight"):
            a, b = a[:rows], b[:rows]
        assert torch.equal(a, b), one
    assert run(monkeypatch, "export", str(tmp_path / "run"), "--out", str(tmp_path / "hf")) == 0
    again, first = tensors_of(tmp_path / "hf"), tensors_of(exported[name])
    assert again.keys() == first.keys()
    assert all(torch.equal(again[one], first[one]) for one in first)
    mine, theirs = (json.loads((f / "config.json").read_text())
                    for f in (tmp_path / "hf", exported[name]))  # fmt: skip
    assert mine == theirs


@pytest.mark.slow
def test_an_imported_run_trains_on_any_grid(
    exported: dict[str, Path], runs: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    values = base_recipe(data)
    values["optimizer"]["learning_rate"] = 1e-3
    recipe = write_recipe(tmp_path / "recipe.yaml", values)
    losses = []
    for processes in (1, 2):
        out = tmp_path / f"run{processes}"
        done = pretrain("import", str(exported["gpt_neox"]), str(recipe), "--out", str(out))
        assert done.returncode == 0, done.stderr
        more = [f"grid.tensor_parallel={processes}"]
        done = pretrain(
            "train", str(out / "config.yaml"), "--out", str(out), *more, processes=processes
        )
        assert done.returncode == 0, done.stderr
        steps = [row["step"] for row in read_metrics(out, "ranks")]
        assert steps[0] == 0 and len(read_metrics(out)) == 6
        losses.append([row["loss"] for row in read_metrics(out)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    last = read_metrics(runs["gpt_neox"])[-1]["loss"]
    assert losses[0][0] < last + 0.2  # it goes on from what was learned, not from noise


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama"])
def test_a_foreign_model(
    kind: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that `transformers` made: our logits are its own to 1e-5."""
    torch.manual_seed(0)
    common = {"vocab_size": 500, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, **common)
    else:
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "intermediate_size": 64, "max_position_embeddings": 32}  # fmt: skip
        make = transformers.GPTNeoXConfig if kind == "gpt_neox" else transformers.LlamaConfig
        config = make(**shape, **common)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # biases and norms away from zero and one, so that a swap shows
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "hf")
    recipe = write_recipe(tmp_path / "recipe.yaml", base_recipe(data))
    words = ["import", str(tmp_path / "hf"), str(recipe), "--out", str(tmp_path / "run")]
    assert run(monkeypatch, *words) == 0
    checkpoint = Checkpoint(list_checkpoints(tmp_path / "run/checkpoints")[-1])
    ours = GPT(checkpoint.config.model, ParameterFactory(0))
    tokens = torch.randint(0, 500, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(checkpoint.full(info_of(parameter).name))
        found = ours(tokens).transpose(0, 1)[..., :500]
        wanted = model(input_ids=tokens).logits
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max().clamp(min=1)


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' cannot be trained on"),
        ({"hidden_act": "relu"}, "activation 'relu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rotary scaling"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"intermediate_size": 48}, "config.json needs"),
        ({"vocab_size": 100}, "vocabulary_size: 100 is less"),
        ({"num_hidden_layers": 3}, "has no model.layers.2"),
    ],
)
def test_what_cannot_be_imported_is_one_line(
    change: dict[str, Any], culprit: str, exported: dict[str, Path], data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "hf"
    folder.mkdir()
    config = json.loads((exported["llama"] / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    save_file(tensors_of(exported["llama"]), folder / "model.safetensors")
    recipe = write_recipe(tmp_path / "recipe.yaml", base_recipe(data))
    words = ["import", str(folder), str(recipe), "--out", str(tmp_path / "run")]
    assert run(monkeypatch, *words) == 2
    text = capsys.readouterr().err
    assert culprit in text and "Traceback" not in text
    assert not (tmp_path / "run").exists()


# --- lm-eval ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["gpt2", "gpt_neox", pytest.param("llama", marks=pytest.mark.long)],  # its card is tried below
)
@pytest.mark.usefixtures("no_task_files")
def test_lm_eval_gives_our_bits_per_byte(
    name: str, exported: dict[str, Path], runs: dict[str, Path], data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The same documents, overall and per subset, through lm-evaluation-harness."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    out = tmp_path / "ours.json"
    words = ["evaluate", str(runs[name]), "--split", "test", "--documents", "20"]
    assert run(monkeypatch, *words, "--out", str(out)) == 0
    ours = json.loads(out.read_text())
    manifest = load_manifest(data)
    decode = load_tokenizer(manifest.tokenizer).decode
    texts = [
        (one.subset, decode([int(t) for t in one.tokens])) for one in held_out(manifest, "test", 20)
    ]
    found = lm_eval_bits(exported[name], texts, tmp_path)
    for subset, bits in found.items():
        mine = ours["overall"] if subset == "all" else ours["subsets"][subset]
        assert mine["documents"] == sum(subset in ("all", own) for own, _ in texts)
        assert bits == pytest.approx(mine["bits_per_byte"], abs=1e-4), subset


@pytest.fixture
def no_task_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval would read its 14,000 files of tasks in each call; no test asks for one of them."""
    evaluator = pytest.importorskip(
        "lm_eval.evaluator", reason="lm-eval is not installed: pip install lm-eval"
    )
    quick = partial(evaluator.TaskManager, include_defaults=False)
    monkeypatch.setattr(evaluator, "TaskManager", quick)


def lm_eval_bits(folder: Path, texts: list[tuple[str, str]], tmp_path: Path) -> dict[str, float]:
    """bits_per_byte of all (subset, document), by a rolling perplexity task, and of each subset."""
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask

    file = tmp_path / "texts.jsonl"
    rows = ({"text": text, "subset": subset} for subset, text in texts)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = ConfigurableTask(config={
        "task": "all",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "bits_per_byte"}],
    })  # fmt: skip
    arguments = {"pretrained": str(folder), "dtype": "float32", "device": "cpu"}
    done = simple_evaluate(
        model="hf", model_args=arguments, tasks=[task], batch_size=4, bootstrap_iters=0,
        verbosity="ERROR", log_samples=True,
    )  # fmt: skip
    found = {"all": done["results"]["all"]["bits_per_byte,none"]}
    assert len(done["samples"]["all"]) == len(texts)
    for subset in {subset for subset, _ in texts}:
        own = [one["bits_per_byte"] for one in done["samples"]["all"]
               if one["doc"]["subset"] == subset]  # fmt: skip
        logarithms, sizes = map(sum, zip(*own, strict=True))
        found[subset] = -logarithms / sizes / math.log(2)
    return found


# --- the code of cards -------------------------------------------------------------------------


def blocks(folder: Path) -> list[str]:
    """The card's Python code."""
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


def run_card(code: str, folder: Path, documents: Path | None = None) -> dict[str, Any]:
    """Run a block as a reader does, who replaces the words in capitals; returns its names."""
    names: dict[str, Any] = {}
    code = code.replace("THIS FOLDER", str(folder)).replace("DOCUMENTS.jsonl", str(documents))
    exec(code, names)
    return names


@pytest.fixture(scope="module")
def unigram(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus, tokenised with a unigram model."""

    def make(folder: Path) -> None:
        train_from_sources([str(corpus)], folder / "unigram.model", 360, "unigram")
        tokenize_sources([str(corpus)], folder / "unigram.model", folder / "data")

    return made_once(tmp_path_factory, "unigram", make) / "data"


def check_card(folder: Path, trained: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both blocks of the card; lm-eval's bits per byte are those of `pretrain evaluate`."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(folder.parent / "cache"))
    out, documents = folder.parent / "ours.json", folder.parent / "documents.jsonl"
    assert run(monkeypatch, "evaluate", str(trained), "--out", str(out)) == 0
    ours = json.loads(out.read_text())["overall"]["bits_per_byte"]
    use, score = blocks(folder)
    tokenizer = run_card(use, folder)["tokenizer"]
    decode = load_manifest(data).open_tokenizer().decode
    chosen = {decode(one.tokens): len(one.tokens) for one in held_out(load_manifest(data), "test")}
    for text, count in chosen.items():
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(tokens) == text
        assert len(tokens) == count  # the same ones, or as many in a tie
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen))
    found = run_card(score, folder, documents)["done"]["results"]["held_out"]
    assert found["bits_per_byte,none"] == pytest.approx(ours, abs=1e-4)
    words = ["evaluate", str(folder), "--data", str(documents), "--out", str(out)]
    assert run(monkeypatch, *words) == 0
    own = json.loads(out.read_text())["overall"]["bits_per_byte"]
    assert found["bits_per_byte,none"] == pytest.approx(own, abs=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("no_task_files")
def test_the_code_of_a_card(unigram: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run whose tokenizer is unigram; every other one is in the long form."""
    recipe = base_recipe(unigram)
    recipe["model"] |= MODELS["llama"]
    recipe["train"]["steps"] = 1
    words = ["train", str(write_recipe(tmp_path / "recipe.yaml", recipe)), "--out"]
    assert run(monkeypatch, *words, str(tmp_path / "run")) == 0
    assert run(monkeypatch, "export", str(tmp_path / "run"), "--out", str(tmp_path / "hf")) == 0
    check_card(tmp_path / "hf", tmp_path / "run", unigram, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_the_code_of_every_card(
    kind: str, data: Path, unigram: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every dialect, both kinds of tokenizer."""
    source = unigram if kind == "unigram" else data
    trained = train_models(tmp_path / "runs", source, MODELS)
    for name, folder in trained.items():
        out = tmp_path / name / "hf"
        assert run(monkeypatch, "export", str(folder), "--out", str(out)) == 0
        check_card(out, folder, source, monkeypatch)


def test_a_card_without_a_tokenizer_for_transformers(
    data: Path, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A conversion that differs is not written: the card uses SentencePiece. No data: ids."""
    import data_pipeline.fast_tokenizer as module

    original = module._merges
    monkeypatch.setattr(module, "_merges", lambda *words: original(*words)[::-1])
    assert run(monkeypatch, "export", str(runs["gpt2"]), "--out", str(tmp_path / "hf")) == 0
    assert "only tokenizer.model (tokenizer.json would give other tokens, such as for" in (
        capsys.readouterr().out
    )
    assert not (tmp_path / "hf" / "tokenizer.json").exists()
    (code,) = blocks(tmp_path / "hf")
    names = run_card(code, tmp_path / "hf")
    manifest = load_manifest(data)
    assert (
        names["tokenizer"].encode("rank") == manifest.open_tokenizer().encode(["rank"])[0].tolist()
    )

    def missing(folder: Path) -> Any:
        raise FileNotFoundError(folder)

    monkeypatch.setattr("pretrain.offline.export.load_manifest", missing)
    assert run(monkeypatch, "export", str(runs["gpt2"]), "--out", str(tmp_path / "bare")) == 0
    (code,) = blocks(tmp_path / "bare")
    assert isinstance(run_card(code, tmp_path / "bare")["model"], torch.nn.Module)

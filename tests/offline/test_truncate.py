"""The use of the low rank: cut products, what they cost, and smaller heads as a real model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.gpt import GPT
from models.layers import ParameterFactory
from models.roles import info_of
from pretrain.checkpoint.reader import Checkpoint, list_checkpoints
from pretrain.config.run import RanksConfig
from pretrain.offline.ranks import find_weights, measure_weights
from pretrain.offline.truncate import CutCheckpoint, RankChoice, cut_product, parse_rank
from pretrain.spectra import product_statistics
from tests.tools import pretrain, run, train_models
from tests.transformers_models import transformers

NOPE = {"dialect": "llama", "position": "none", "hidden_size": 32, "num_attention_heads": 2}


MODELS: dict[str, dict[str, Any]] = {
    "nope": NOPE,
    "gpt_neox": {"dialect": "gpt_neox"},
    "llama": {"dialect": "llama", "num_key_value_heads": 2},
    "qwen3": {"dialect": "llama", "qk_norm": True, "head_dim": 16},
}


@pytest.fixture(scope="module")
def models(data: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A trained run of every kind of model that can be exported."""
    return {"gpt2": trained, **train_models(tmp_path_factory.mktemp("models"), data, MODELS)}


@pytest.fixture(scope="module")
def without_positions(models: dict[str, Path]) -> Path:
    return models["nope"]


def newest(run: Path) -> Path:
    return list_checkpoints(run / "checkpoints")[-1]


def logits_of(checkpoint: Checkpoint, tokens: torch.Tensor) -> torch.Tensor:
    """``[batch, sequence, vocabulary]`` of our own model."""
    model = GPT(checkpoint.config.model, ParameterFactory(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(checkpoint.full(info_of(parameter).name))
        found = model(tokens).transpose(0, 1)
    logits: torch.Tensor = found[..., : checkpoint.config.model.vocabulary_size]
    return logits


def tokens_for(checkpoint: Checkpoint) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    model = checkpoint.config.model
    return torch.randint(model.vocabulary_size, (3, model.context), generator=generator)


def test_best_approximation() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 40, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    left, right = cut_product(a, b, torch.tensor([3, 8]))
    u, s, v = torch.linalg.svd(a @ b.mT)
    s[0, 3:] = 0
    assert torch.allclose(left @ right.mT, u @ torch.diag_embed(s) @ v, atol=1e-12)
    assert (left[0, :, 3:] == 0).all() and (right[0, :, 3:] == 0).all()


@pytest.mark.parametrize("share", ["1.0", "1"])
def test_rank_one_changes_nothing(
    trained: Path, share: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def perplexity(*words: str) -> float:
        out = tmp_path / f"{len(words)}.json"
        assert run(monkeypatch, "evaluate", str(trained), "--out", str(out), *words) == 0
        perplexity: float = json.loads(out.read_text())["overall"]["perplexity"]
        return perplexity

    assert perplexity("--attention-rank", share) == pytest.approx(perplexity(), rel=1e-5)


def test_full_rank_through_the_decomposition_changes_nothing(trained: Path) -> None:
    """Not only by leaving a share of 1 alone: 0.999 rounds to every singular value."""
    whole = Checkpoint(newest(trained))
    cut = CutCheckpoint(newest(trained), RankChoice(0.999))
    tokens = tokens_for(whole)
    assert torch.allclose(logits_of(cut, tokens), logits_of(whole, tokens), atol=1e-5)
    assert not torch.equal(cut.full("blocks.0.attention.query.weight"),
                           whole.full("blocks.0.attention.query.weight"))  # fmt: skip


@pytest.mark.parametrize(("text", "kept"), [("0.5", 4), ("0.25", 2), ("0.01", 1)])
@pytest.mark.parametrize("products", ["both", "qk", "vp"])
def test_rank_is_what_was_asked(trained: Path, text: str, kept: int, products: str) -> None:
    cut = CutCheckpoint(newest(trained), parse_rank(text, products))
    for layer in range(2):
        factors = cut.attention(layer)
        pairs = {
            "qk": (factors.key.mT, factors.query[:, 0].mT),
            "vp": (factors.output[:, 0], factors.value.mT),
        }
        for product, (a, b) in pairs.items():
            sigma = product_statistics(a, b).singular_values
            rank = (sigma > 1e-6 * sigma[:, :1]).sum(-1)
            wanted = kept if products in ("both", product) else 8
            assert (rank == wanted).all(), (product, rank)


def test_measured_rank(trained: Path) -> None:
    cut = CutCheckpoint(newest(trained), RankChoice(None))
    rows, _ = measure_weights(find_weights(str(trained)), RanksConfig())
    for row in rows:
        factors = cut.attention(row["layer"])
        head = row["head"]
        a, b = (
            (factors.key[head].mT, factors.query[head, 0].mT)
            if row["product"] == "qk"
            else (factors.output[head, 0], factors.value[head].mT)
        )
        sigma = torch.linalg.svdvals(a.double() @ b.double().mT)
        assert int((sigma > 1e-6 * sigma[0]).sum()) == round(row["pseudo_rank"] * 8)


def test_biases_are_absorbed(trained: Path) -> None:
    """Cutting nothing but through the decomposition leaves scores with biases as they were."""
    path = newest(trained)
    whole, cut = Checkpoint(path), CutCheckpoint(path, RankChoice(0.999))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))

    def scores(source: Checkpoint) -> torch.Tensor:
        q, k = (
            x @ source.full(f"blocks.0.attention.{part}.weight").mT
            + source.full(f"blocks.0.attention.{part}.bias") + bias
            for part, bias in (("query", 0.0), ("key", 0.0))
        )  # fmt: skip
        return q[:, :8] @ k[:, :8].mT

    assert torch.allclose(scores(whole), scores(cut), atol=1e-6)


@pytest.mark.parametrize("choice", [None, "0.5", "measured"])
def test_smaller_heads_in_transformers(
    without_positions: Path, choice: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["export", str(without_positions), "--out", str(tmp_path / "hf")]
    assert run(monkeypatch, *words, *(["--attention-rank", choice] if choice else [])) == 0
    path = newest(without_positions)
    ours = CutCheckpoint(path, parse_rank(choice)) if choice else Checkpoint(path)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["head_dim"] < 16) == (choice is not None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = tokens_for(ours)
    with torch.no_grad():
        found = theirs(input_ids=tokens).logits
    assert (found - logits_of(ours, tokens)).abs().max() < 1e-4
    if choice == "0.5":
        assert config["head_dim"] == 8
        assert theirs.model.layers[0].self_attn.q_proj.weight.shape == (16, 32)


@pytest.mark.parametrize("model", ["gpt2", "gpt_neox", "llama", "qwen3"])
def test_every_dialect_in_transformers(
    model: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = models[model]
    assert run(monkeypatch, "export", str(path), "--out", str(tmp_path / "hf")) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ours = Checkpoint(newest(path))
    tokens = tokens_for(ours)
    with torch.no_grad():
        found = theirs(input_ids=tokens).logits
    assert (found - logits_of(ours, tokens)).abs().max() < 1e-4
    # and its statistics, read back, are the run's own
    back, _ = measure_weights(find_weights(str(tmp_path / "hf")), RanksConfig())
    own, _ = measure_weights(find_weights(str(path)), RanksConfig())
    for one, other in zip(back, own, strict=True):
        for key in ("pseudo_rank", "nuclear_norm", "discrepancy", "rope_pairs_alive"):
            assert one[key] == pytest.approx(other[key], rel=1e-6, nan_ok=True), key


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("evaluate", "{run}", "--attention-rank", "2"), "--attention-rank: 2"),
        (
            ("evaluate", "{run}", "--attention-rank", "0.5", "--attention-product", "x"),
            "x is not one",
        ),
        (("export", "{run}", "--out", "{out}", "--attention-rank", "0.5"), "position=none"),
        (("export", "{run}", "--out", "{run}"), "not empty"),
    ],
)
def test_mistakes(
    words: tuple[Any, ...], said: str, trained: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    filled = [word.format(run=trained, out=tmp_path / "out") for word in words]
    assert run(monkeypatch, *filled) == 2
    text = capsys.readouterr().err
    assert said in text and text.count("\n") == 1


def test_rotary_products_are_refused(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(models["llama"]), "--attention-rank", "0.5"]
    assert run(monkeypatch, *words) == 2
    assert "--attention-product vp" in capsys.readouterr().err
    assert run(monkeypatch, *words, "--attention-product", "vp") == 0


def test_cut_on_a_grid(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same perplexity on two tensor-parallel processes."""
    words = ["evaluate", str(trained), "--attention-rank", "0.5", "--out"]
    assert run(monkeypatch, *words, str(tmp_path / "1.json")) == 0
    done = pretrain(*words, str(tmp_path / "2.json"), "grid.tensor_parallel=2", processes=2)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / f"{n}.json").read_text())["overall"]["loss"] for n in (1, 2))
    assert one == pytest.approx(two, rel=1e-5)

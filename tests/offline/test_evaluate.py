"""Held-out figures: every token once, as lm-eval windows them, whatever the batch."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_pipeline.dataset import held_out
from data_pipeline.manifest import load_manifest
from models.config import GPTConfig
from models.gpt import GPT
from models.layers import ParameterFactory
from pretrain.config.science import GridConfig
from pretrain.distributed.grid import Grid, build_grid, connect
from pretrain.tasks.score import documents_hash, score, summarize, windows


def rolling(tokens: list[int], prefix: int, size: int) -> list[tuple[list[int], list[int]]]:
    """(inputs, targets) as lm-eval's get_rolling_token_windows defines them, written anew."""
    first = min(size, len(tokens))
    found = [([prefix, *tokens[: first - 1]], tokens[:first])]
    done = first
    while done < len(tokens):
        count = min(len(tokens) - done, size)
        end = done + count
        found.append((tokens[end - size - 1 : end - 1], tokens[done:end]))
        done = end
    return found


@pytest.mark.parametrize("length", [1, 5, 8, 9, 15, 16, 17, 40])
def test_windows_are_lm_evals(length: int) -> None:
    tokens = np.arange(100, 100 + length)
    found = list(windows(tokens, 1, 8, 8))
    wanted = rolling(tokens.tolist(), 1, 8)
    assert [(w.inputs.tolist(), w.targets.tolist()) for w in found] == wanted


@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 23, 64])
def test_every_token_once_with_context(length: int, stride: int) -> None:
    tokens = np.arange(100, 100 + length)
    found = list(windows(tokens, 1, 8, stride))
    assert np.concatenate([w.targets for w in found]).tolist() == tokens.tolist()
    for window in found:
        assert 1 <= len(window.targets) <= len(window.inputs) <= 8
        # What is predicted last follows what is seen last.
        assert window.inputs[-1] in (1, window.targets[-1] - 1)


@pytest.fixture(scope="module")
def setting(data: Path) -> tuple[Grid, GPTConfig, GPT]:
    grid = build_grid(GridConfig(), connect())
    config = GPTConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, context=24, vocabulary_size=400
    )
    return grid, config, GPT(config, ParameterFactory(3))


def test_score_is_the_sum_over_windows(data: Path, setting: tuple[Grid, GPTConfig, GPT]) -> None:
    grid, config, model = setting
    manifest = load_manifest(data)
    documents = held_out(manifest, "val", 5)
    nats = score(model, grid, config, documents, manifest.eod, batch=3)
    for document, found in zip(documents, nats, strict=True):
        total = 0.0
        for inputs, targets in rolling(document.tokens.tolist(), manifest.eod, 24):
            with torch.no_grad():
                logits = model(torch.tensor([inputs]))[:, 0].double()[-len(targets) :, :400]
            total += F.cross_entropy(logits, torch.tensor(targets), reduction="sum").item()
        assert found == pytest.approx(total, rel=1e-5)


def test_batch_does_not_matter_but_stride_does(
    data: Path, setting: tuple[Grid, GPTConfig, GPT]
) -> None:
    grid, config, model = setting
    manifest = load_manifest(data)
    documents = held_out(manifest, "test")
    one = score(model, grid, config, documents, manifest.eod, batch=1)
    many = score(model, grid, config, documents, manifest.eod, batch=7)
    np.testing.assert_allclose(one, many, rtol=1e-5)
    strided = score(model, grid, config, documents, manifest.eod, batch=7, stride=8)
    assert not np.allclose(strided, many, rtol=1e-5)


def test_figures(data: Path) -> None:
    manifest = load_manifest(data)
    documents = held_out(manifest, "test")
    nats = np.arange(1.0, len(documents) + 1)
    figures = summarize(documents, nats)
    overall = figures["overall"]
    entries = manifest.split("test")
    assert overall["documents"] == sum(e.documents for e in entries)
    assert overall["bytes"] == sum(e.bytes for e in entries)
    assert overall["tokens"] == sum(e.tokens - e.documents for e in entries)  # without the ends
    assert overall["loss"] == pytest.approx(nats.sum() / overall["tokens"])
    assert overall["perplexity"] == pytest.approx(math.exp(overall["loss"]))
    bits = nats.sum() / math.log(2) / overall["bytes"]
    assert overall["bits_per_byte"] == pytest.approx(bits)
    parts = figures["subsets"]
    assert sum(part["bytes"] for part in parts.values()) == overall["bytes"]
    shares = {"ArXiv": 8.96, "Github": 7.59, "Wikipedia (en)": 1.53}
    weighted = sum(s * parts[n]["bits_per_byte"] for n, s in shares.items()) / sum(shares.values())
    assert figures["pile_weighted"]["bits_per_byte"] == pytest.approx(weighted)
    assert figures["pile_subsets_present"] == ["ArXiv", "Github", "Wikipedia (en)"]
    assert len(figures["pile_subsets_absent"]) == 19
    assert documents_hash(documents) == documents_hash(documents[::-1])
    assert documents_hash(documents) != documents_hash(documents[1:])
    json.dumps(figures)


def test_sample_is_fixed(data: Path) -> None:
    manifest = load_manifest(data)
    small, large = ({d.hash for d in held_out(manifest, "val", n)} for n in (4, 9))
    assert small < large and len(small) == 4 and len(large) == 9

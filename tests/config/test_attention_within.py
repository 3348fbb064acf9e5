"""Where `data.attention: within` is refused, and where documents are known to end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.adopt import adopt
from data_pipeline.document_ends import check_document_ends
from data_pipeline.light_imports import import_light
from data_pipeline.manifest import load_manifest
from data_pipeline.records import DataError
from pretrain.config.recipe import parse_config
from pretrain.distributed.grid import Grid
from pretrain.engine.speed import choose_kernels
from pretrain.errors import UsageError
from pretrain.tasks.text import Text
from tests.tools import base_recipe, losses_of, run, run_workers, weights_of, write_recipe


@pytest.mark.parametrize("task", ["recall", "images"])
def test_tasks_without_documents(task: str) -> None:
    more = {"images": {"dialect": "vit", "image_size": 8, "patch_size": 4}}
    shape = {"model": {**more.get(task, {"context": 41}), "num_layers": 1}}
    values = {**shape, "task": {"kind": task}, "data": {"attention": "within"}}
    with pytest.raises(UsageError, match=f"data.attention: within needs .* task.kind {task}"):
        parse_config(values)
    parse_config({**values, "data": {"attention": "across"}})


def tokenizer_of(data: Path) -> Path:
    return load_manifest(data).tokenizer


def write_pair(prefix: Path, documents: list[list[int]]) -> Path:
    (indexed,) = import_light("megatron.core.datasets.indexed_dataset")
    builder = indexed.IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for tokens in documents:
        builder.add_document(torch.tensor(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_documents_that_do_not_end(data: Path, tmp_path: Path) -> None:
    """One open document is enough; samples that are packed need only contain ends."""
    eod = load_manifest(data).eod
    ended = [[*range(50, 60 + number % 7), eod] for number in range(40)]
    packed = [[eod, *range(50, 82)] for _ in range(40)]
    cases = {
        "ended": (ended, ""),
        "one open": ([*ended[:7], ended[7][:-1], *ended[8:]], "1 of 40 documents looked at do not"),
        "all open": ([tokens[:-1] for tokens in ended], "40 of 40"),
        "packed": (packed, ""),
        "packed, no ends": ([[60, *row[1:]] for row in packed], "none of 40 samples looked at"),
    }
    for name, (documents, culprit) in cases.items():
        prefix = write_pair(tmp_path / name, documents)
        adopt([prefix], tokenizer_of(data), tmp_path / f"{name} adopted", (1.0, 0.0, 0.0))
        manifest = load_manifest(tmp_path / f"{name} adopted")
        subsets = [entry.subset for entry in manifest.split("train")]
        if not culprit:
            check_document_ends(manifest, subsets)
            continue
        with pytest.raises(DataError, match=culprit) as caught:
            check_document_ends(manifest, subsets)
        assert f"token {eod}" in str(caught.value)
        check_document_ends(manifest, [])  # of subsets that are left out, nothing is asked
    recipe = base_recipe(tmp_path / "one open adopted")
    recipe["data"]["attention"] = "within"
    config = parse_config(recipe)
    with pytest.raises(DataError, match="within"):
        Text.open(config).training(config)
    recipe["data"]["attention"] = "across"
    config = parse_config(recipe)
    assert len(Text.open(config).training(config))


@pytest.mark.slow
def test_a_run_keeps_its_attention(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A resumed run is the uninterrupted one; a resume with the other value is refused."""
    recipe = base_recipe(data)
    recipe["data"]["attention"] = "within"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    stopped = {"recipe": recipe, "run": str(cut), "stop": 3}
    other = {**recipe, "data": recipe["data"] | {"attention": "across"}}
    runs = [(recipe, whole), (other, tmp_path / "across"), (recipe, cut)]
    plain, across, rest = ({"recipe": values, "run": str(folder)} for values, folder in runs)
    run_workers(1, "train", [plain, across, stopped], tmp_path / "first")
    apart = np.abs(losses_of(tmp_path / "across") / losses_of(whole) - 1)
    assert apart.max() > 2e-5  # more than any grid may differ
    file = write_recipe(tmp_path / "recipe.yaml", recipe)
    words = ("train", str(file), "data.attention=across", "--out", str(cut))
    assert run(monkeypatch, *words) == 2
    assert "data.attention" in capsys.readouterr().err
    run_workers(1, "train", [rest], tmp_path / "second")
    wanted, found = weights_of(whole), weights_of(cut)
    assert all(np.array_equal(found[name], values) for name, values in wanted.items())


@pytest.mark.parametrize(
    ("device", "attention", "heads", "wanted"),
    [
        ("cpu", "auto", 2, "products"),
        ("cuda", "auto", 2, "flex"),
        ("cuda", "sdpa", 2, "flex"),
        ("cuda", "products", 2, "products"),
        ("cuda", "auto", 4, "products"),  # heads 8 wide, for which there is no kernel
    ],
)
def test_who_computes_it(device: str, attention: str, heads: int, wanted: str) -> None:
    model = {"hidden_size": 32, "num_attention_heads": heads, "context": 32}
    config = parse_config({"model": model, "speed": {"attention": attention}, "precision": "fp32"})
    grid = Grid(1, 1, 1, 0, torch.device(device), None, None, None, False)
    assert choose_kernels(config, grid).documents == wanted

"""`pretrain ranks` of models that others wrote: every family against the library's own modules."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from models.families import known_families
from models.huggingface import open_pretrained
from models.roles import ModelError
from pretrain.config.run import RanksConfig
from pretrain.offline.ranks import find_weights, measure_weights
from tests.tools import run
from tests.transformers_models import FAMILIES, Products, build, dense_products, save

pytestmark = pytest.mark.slow

SPECTRA = RanksConfig(spectra=True)


def deviation(folder: Path, wanted: Products) -> float:
    """Largest |Δσ| / σ₁ over all heads and products."""
    rows, _ = measure_weights(find_weights(str(folder)), SPECTRA)
    heads = [row for row in rows if row["level"] == "head"]
    assert len(heads) == len(wanted)
    worst = 0.0
    for row in heads:
        key = (row.get("tower", ""), row["layer"], row["product"], row["head"])
        found = torch.tensor(row["singular_values"], dtype=torch.float64)
        exact = torch.linalg.svdvals(wanted[key])[: len(found)]
        worst = max(worst, ((found - exact).abs().max() / exact[0]).item())
    return worst


@pytest.mark.parametrize("family", FAMILIES)
def test_families_agree_with_the_library(family: str, tmp_path: Path) -> None:
    model = build(family)
    save(model, tmp_path / "model")
    wanted = dense_products(model, family)
    assert deviation(tmp_path / "model", wanted) < 1e-6


@pytest.mark.parametrize("form", ["sharded", "bin"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_other_files(family: str, form: str, tmp_path: Path) -> None:
    model = build(family)
    save(model, tmp_path / "model", form)
    if form == "sharded":
        assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    assert deviation(tmp_path / "model", dense_products(model, family)) < 1e-6


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gpt_neox", {"order": "stacked"}),  # wrongly interleaved
        ("gpt2", {"order": "per_head"}),
        ("phi3", {"order": "per_head"}),
        ("gpt2", {"transposed": False}),
        ("llama", {"query": "k_proj.weight", "key": "q_proj.weight"}),
        ("opt", {"value": "q_proj.weight", "query": "v_proj.weight"}),  # swapped
        ("bert", {"key": "self.value.weight", "value": "self.key.weight"}),
    ],
)
def test_a_wrong_map_is_seen(
    family: str, change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family)
    save(model, tmp_path / "model")
    wanted = dense_products(model, family)
    known = known_families()[family]
    tower = known.towers[""].model_copy(update=change)
    wrong = known.model_copy(update={"towers": {"": tower}})
    monkeypatch.setitem(known_families(), family, wrong)
    with contextlib.suppress(ModelError):  # the shapes may already say so
        assert deviation(tmp_path / "model", wanted) > 1e-3


def test_grouped_and_normalised(tmp_path: Path) -> None:
    save(build("qwen3"), tmp_path / "qwen3")
    rows, scatter = measure_weights(find_weights(str(tmp_path / "qwen3")), RanksConfig())
    groups = [row for row in rows if row["level"] == "group"]
    assert len(groups) == 2 * 2 * 2  # layers, products, key/value heads
    assert all(row["balance"] != row["balance"] for row in groups if row["product"] == "qk")
    assert all(row["balance"] > 0 for row in groups if row["product"] == "vp")
    assert all(row["rope_pairs_alive"] > 0 for row in rows if row["product"] == "qk")
    scatter.write(tmp_path / "figures")
    assert (tmp_path / "figures/scatter.png").stat().st_size > 10_000


def test_revisions_make_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gpt_neox")
    for step in (0, 512, 1000):
        save(model, tmp_path / f"pythia/step{step}")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
    out = tmp_path / "table.parquet"
    words = ["ranks", str(tmp_path / "pythia"), "--out", str(out), "--batch-tokens", "2097152"]
    assert run(monkeypatch, *words) == 0
    import pyarrow.parquet as pq

    rows = pq.read_table(out).to_pylist()
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert {row["step"] for row in rows} == {0, 512, 1000}
    assert {row["tokens"] for row in rows} == {0, 512 * 2097152, 1000 * 2097152}
    first, last = (
        [row for row in rows if row["step"] == step and row["layer"] == 0 and row["head"] == 0]
        for step in (0, 1000)
    )
    assert last[0]["nuclear_norm"] == pytest.approx(16 * first[0]["nuclear_norm"])
    assert last[0]["pseudo_rank"] == first[0]["pseudo_rank"]


def test_same_columns_as_a_run(trained: Path, tmp_path: Path) -> None:
    from pretrain.ranks.table import write_rows
    from pretrain.runs.folder import read_ranks

    save(build("gpt2"), tmp_path / "model")
    rows, _ = measure_weights(find_weights(str(tmp_path / "model")), SPECTRA)
    own = read_ranks(trained)
    assert set(rows[0]) == set(own[0])
    again, _ = measure_weights(find_weights(f"{trained}@*"), SPECTRA)
    assert {row["step"] for row in again} == {3, 6}
    write_rows(tmp_path / "own.parquet", again)
    keys = ("step", "layer", "product", "level", "head")
    kept = {tuple(row[key] for key in keys): row for row in own}
    for row in again:
        assert row["singular_values"] == kept[tuple(row[key] for key in keys)]["singular_values"]


def test_an_unknown_family_is_described_in_ten_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build("llama")
    save(model, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["model_type"] = "mine"
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert run(monkeypatch, "ranks", str(tmp_path / "model")) == 2
    text = capsys.readouterr().err
    assert "mine" in text and "layers.0.self_attn.k_proj.weight" in text and "--family" in text
    assert text.count("\n") == 1
    family = {
        "layer": "layers.{layer}.self_attn.",
        "query": "q_proj.weight",
        "key": "k_proj.weight",
        "value": "v_proj.weight",
        "output": "o_proj.weight",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "key_value_heads": "num_key_value_heads",
        "width": "hidden_size",
    }
    path = tmp_path / "family.yaml"
    path.write_text(yaml.safe_dump(family))
    assert run(monkeypatch, "ranks", str(tmp_path / "model"), "--family", str(path)) == 0


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    def fails(folder: Path, *words: str) -> None:
        with pytest.raises(ModelError) as caught:
            measure_weights(find_weights(str(folder)), RanksConfig())
        assert all(word in str(caught.value) for word in words), caught.value

    def fresh(name: str, form: str = "safetensors") -> Path:
        save(build("llama"), tmp_path / name, form)
        return tmp_path / name

    cut = fresh("cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1000])
    fails(cut.parent, "model.safetensors", "damaged")
    sharded = fresh("sharded", "sharded")
    next(iter(sorted(sharded.glob("*.safetensors")))).unlink()
    fails(sharded, "No such file")
    index = fresh("index", "sharded") / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"] = dict.fromkeys(values["weight_map"], "../../secret.safetensors")
    index.write_text(json.dumps(values))
    fails(index.parent, "not in the folder")
    config = fresh("config") / "config.json"
    config.write_text("{")
    fails(config.parent, "config.json", "damaged")
    heads = fresh("heads") / "config.json"
    values = json.loads(heads.read_text())
    heads.write_text(json.dumps(values | {"num_attention_heads": 8, "head_dim": 12}))
    fails(heads.parent, "q_proj", "--family")
    (fresh("empty") / "model.safetensors").unlink()
    fails(tmp_path / "empty", "no weights")
    pickled = fresh("pickled", "bin") / "pytorch_model.bin"

    torch.save({"weights": _Foreign()}, pickled)
    fails(pickled.parent, "more than tensors")


class _Foreign:
    """What unpickling would run code for."""


def test_no_network_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    assert run(monkeypatch, "ranks", "nobody/such-a-model") == 2
    text = capsys.readouterr().err
    assert "nobody/such-a-model" in text and "cannot be reached" in text
    assert text.count("\n") == 1


def test_towers(tmp_path: Path) -> None:
    save(build("clip"), tmp_path / "clip")
    towers = open_pretrained(tmp_path / "clip")
    assert [tower.name for tower in towers] == ["text", "vision"]

"""The files of an exported model: one, or several with an index; the tensors are the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tools import run


@pytest.mark.parametrize("least", [1, 9_000, 40_000, 1 << 40])
def test_small_parts_are_joined(
    least: int, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.offline.export._SHARD", least)
    assert run(monkeypatch, "export", str(trained), "--out", str(tmp_path / "model")) == 0
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    tensors = {name: part for file in files for name, part in load_file(file).items()}
    index = tmp_path / "model/model.safetensors.index.json"
    if len(files) == 1:
        assert files[0].name == "model.safetensors" and not index.exists()
    else:
        listed = json.loads(index.read_text())
        assert listed["weight_map"] == {
            name: file.name for file in files for name in load_file(file)
        }
        assert listed["metadata"]["total_size"] == sum(one.nbytes for one in tensors.values())
        assert all(file.stat().st_size >= least for file in files[:-1])
    assert (len(files) == 1) == (least > 100_000), files
    monkeypatch.setattr("pretrain.offline.export._SHARD", 1)
    assert run(monkeypatch, "export", str(trained), "--out", str(tmp_path / "parts")) == 0
    apart = {
        name: part
        for file in (tmp_path / "parts").glob("*.safetensors")
        for name, part in load_file(file).items()
    }
    assert apart.keys() == tensors.keys()
    assert all(torch.equal(apart[name], tensors[name]) for name in apart)

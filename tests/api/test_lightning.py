"""Lightning's callback, by a stand-in for Lightning, which need not be installed."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.api.groups import decay_groups
from pretrain.errors import UsageError
from pretrain.ranks.table import read_ranks
from pretrain.report.load import load_study
from tests.transformers_models import build


class StandIn:
    """What a Trainer of Lightning has, and the order in which it calls its callbacks."""

    def __init__(self, callback: Any, optimizer: Any, updates: int, accumulate: int) -> None:
        self.callback, self.optimizers = callback, [optimizer]
        self.estimated_stepping_batches, self.accumulate = updates, accumulate
        self.global_step, self.callback_metrics = 0, {"val_loss": torch.tensor(4.0)}

    def fit(self, module: Any) -> None:
        self.callback.on_train_start(self, module)
        for number in range(self.estimated_stepping_batches * self.accumulate):
            tokens = torch.arange(16).view(1, 16)
            loss = module.model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            if number % self.accumulate == self.accumulate - 1:
                self.optimizers[0].step()
                self.optimizers[0].zero_grad()
                self.global_step += 1
            outputs = {"loss": loss.detach()}
            self.callback.on_train_batch_end(self, module, outputs, None, number)
        self.callback.on_validation_end(self, module)
        self.callback.on_train_end(self, module)


@pytest.fixture
def callbacks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the callback, with a module `lightning` of ours."""
    lightning = types.ModuleType("lightning")
    lightning.__spec__ = importlib.machinery.ModuleSpec("lightning", None)
    lightning.pytorch = types.ModuleType("lightning.pytorch")  # type: ignore[attr-defined]
    lightning.pytorch.Callback = type("Callback", (), {})
    monkeypatch.setitem(sys.modules, "lightning", lightning)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", lightning.pytorch)
    monkeypatch.delitem(sys.modules, "pretrain.api.lightning", raising=False)
    yield importlib.import_module("pretrain.api.lightning")
    sys.modules.pop("pretrain.api.lightning", None)


@pytest.mark.parametrize("watched", [False, True])
def test_a_run_of_lightning(callbacks: Any, tmp_path: Path, watched: bool) -> None:
    model = build("gpt2")
    if watched:
        optimizer, groups = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.3), None
    else:
        groups = decay_groups(model, default=0.1, attention=0.3)
        optimizer = groups.attach(torch.optim.AdamW(groups, lr=1e-2))
    callback = callbacks.LightningRankCallback(tmp_path / "run", decay=groups, log_every=1, every=2)
    module = types.SimpleNamespace(model=model)
    StandIn(callback, optimizer, updates=3, accumulate=2).fit(module)
    (run,) = load_study([tmp_path]).runs
    assert run.last_step == 3 and len(run.metrics) == 3
    assert run.held_out[0]["loss"] == 4.0
    assert run.decay == 0.3 and run.exposure == pytest.approx(3 * 1e-2 * 0.3)


def test_a_run_of_lightning_continues_only_if_it_resumes(callbacks: Any, tmp_path: Path) -> None:
    model = build("gpt2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    module = types.SimpleNamespace(model=model)

    def trainer(updates: int) -> StandIn:
        callback = callbacks.LightningRankCallback(tmp_path / "run", log_every=1, every=2)
        return StandIn(callback, optimizer, updates, accumulate=1)

    trainer(2).fit(module)
    with pytest.raises(UsageError, match=r"up to step 2; .* Trainer that resumes"):
        trainer(2).fit(module)
    resumed = trainer(2)
    resumed.global_step = 2  # as Lightning restores it first
    resumed.fit(module)
    assert {row["step"] for row in read_ranks(tmp_path / "run")} == {0, 2, 4}


def test_without_lightning_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pretrain.api.lightning", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install lightning"):
        importlib.import_module("pretrain.api.lightning")

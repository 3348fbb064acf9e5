"""Ranks of models of other loops: equal to `pretrain ranks`, in folders that reports read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from pretrain.api.groups import decay_groups
from pretrain.api.probe import RankProbe
from pretrain.config.run import RanksConfig
from pretrain.errors import UsageError
from pretrain.offline.ranks import find_weights, measure_weights
from pretrain.ranks.probe import Row
from pretrain.ranks.schema import COLUMNS
from pretrain.ranks.table import read_ranks
from pretrain.report.load import load_study
from pretrain.runs.folder import read_starts
from pretrain.runs.lock import BusyError
from pretrain.runs.loop import refuse_loop
from tests.api.by_slices import RATE, STEPS, WORDS, build_odd, expected, mostly_long, whole
from tests.tools import base_recipe, run, run_processes, write_recipe
from tests.transformers_models import FAMILIES, build

LABELS = ("tokens", "decay_a", "decay_b", "exposure_a", "exposure_b", "retention_a", "retention_b")


def assert_equal(mine: list[Row], wanted: list[Row]) -> None:
    """Two tables say the same, beside what only training knows."""
    assert len(mine) == len(wanted) > 0
    keys = ("layer", "product", "level", "head")
    wanted = sorted(  # as this program's own training writes them
        wanted, key=lambda row: (row.get("tower", ""), *(row[key] for key in keys))
    )
    for row, other in zip(mine, wanted, strict=True):
        for name in row.keys() - set(LABELS):
            if isinstance(row[name], float):
                assert row[name] == pytest.approx(other[name], rel=1e-6, abs=1e-6, nan_ok=True)
            else:
                assert row[name] == other[name], name


@pytest.mark.parametrize("family", mostly_long("clip", *sorted(FAMILIES.keys() - {"clip"})))
def test_ranks_are_those_of_the_saved_model(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path)
    wanted, _ = measure_weights(find_weights(str(tmp_path)), RanksConfig())
    assert_equal(RankProbe(model).measure(0), wanted)


def loop(folder: Path, seed: int, attention: float, steps: int = 4, family: str = "gpt2") -> Any:
    """A run of a loop of one's own."""
    model = build(family)
    groups = decay_groups(model, default=0.1, attention=attention)
    optimizer = groups.attach(torch.optim.AdamW(groups, lr=1e-2))
    torch.manual_seed(seed)
    with RankProbe(
        model, folder, steps=steps, every=2, log_every=1, decay=groups, seed=seed,
        learning_rate=1e-2, global_batch=2, context=16,
    ) as probe:  # fmt: skip
        for step in range(1, steps + 1):
            tokens = torch.randint(0, 64, (2, 16))
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            probe.step(step, loss=loss, learning_rate=1e-2, tokens=32 * step)
    return model, probe


def test_a_loop_of_ones_own_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for attention in (0.0, 0.5):
        model, probe = loop(tmp_path / f"runs/a{attention}", 1, attention)
    study = load_study([tmp_path / "runs"])
    assert study.notes == []
    assert [(one.name, one.decay, len(one.runs)) for one in study.conditions] == [
        ("attention = 0", 0.0, 1),
        ("attention = 0.5", 0.5, 1),
    ]
    assert study.conditions[1].exposure == pytest.approx(4 * 1e-2 * 0.5)
    folder = tmp_path / "runs/a0.5"
    rows = read_ranks(folder)
    assert {row["step"] for row in rows} == {0, 2, 4}
    schema = pq.read_schema(folder / "ranks.parquet").names
    assert schema == [
        column.name for column in COLUMNS
        if column.source != "label" and column.name != "singular_values"
    ]  # fmt: skip
    assert len(probe.table()) == len(rows)

    # without a model in the folder, the last measurement; with one, its weights
    assert run(monkeypatch, "ranks", str(folder), "--json") == 0
    measured = json.loads(capsys.readouterr().out)
    model.save_pretrained(folder)
    assert run(monkeypatch, "ranks", str(folder), "--json") == 0
    of_weights = json.loads(capsys.readouterr().out)
    assert measured["step"] == of_weights["step"] == 4
    for name, value in of_weights["all"].items():
        assert measured["all"][name] == pytest.approx(value, abs=1e-6)
    for step in (2, 4):
        model.save_pretrained(folder / f"checkpoint-{step}")
    assert [one.step for one in find_weights(f"{folder}@*")] == [2, 4]
    assert [one.step for one in find_weights(f"{folder}@2")] == [2]
    with pytest.raises(UsageError, match="no such step"):
        find_weights(f"{folder}@3")


def test_a_run_folder_belongs_to_one_loop(tmp_path: Path) -> None:
    model = build("gpt2")
    recipe = write_recipe(tmp_path / "recipe.yaml", base_recipe(tmp_path / "data"))
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    (ours / "config.yaml").write_text(recipe.read_text())
    with pytest.raises(UsageError, match="holds a run of"):
        RankProbe(model, ours)
    first = RankProbe(model, theirs)
    with pytest.raises(BusyError):
        RankProbe(model, theirs)
    first.close()
    with pytest.raises(UsageError, match="another loop"):
        refuse_loop(theirs)


def test_a_loop_that_continues_forgets_what_came_later(tmp_path: Path) -> None:
    loop(tmp_path / "run", 0, 0.5)
    model = build("gpt2")
    probe = RankProbe(model, tmp_path / "run", steps=4, every=2, log_every=1)
    probe.begin(2)
    probe.step(3, loss=1.0)
    probe.close()
    assert {row["step"] for row in read_ranks(tmp_path / "run")} == {0, 2}
    lines = [json.loads(one) for one in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = {one["step"]: one["loss"] for one in lines if one["kind"] == "train"}
    assert set(losses) == {1, 2, 3} and losses[3] == 1.0


def files_of(run: Path) -> dict[str, bytes]:
    """The content of a folder, without its lock."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and "lock" not in path.name
    }


def test_a_loop_does_not_begin_over_another(tmp_path: Path) -> None:
    """As when a cell of a notebook runs twice: nothing of the first run is touched."""
    run = tmp_path / "run"
    loop(run, 0, 0.5)
    before = files_of(run)
    with pytest.raises(UsageError, match=r"run: .*up to step 4; .*another folder.*begin\(STEP\)"):
        loop(run, 1, 0.1, family="llama")
    probe = RankProbe(build("gpt2"), run, steps=4, every=2, log_every=1)
    with pytest.raises(UsageError, match="up to step 4"):
        probe.begin()
    with pytest.raises(UsageError, match="up to step 4"):
        probe.step(4, loss=1.0)
    with pytest.raises(UsageError, match="up to step 4"):
        probe.measure(4)
    RankProbe(build("llama"), run).close()  # it wrote nothing
    assert files_of(run) == before
    probe.begin(2)  # the mend works with the refused probe, too
    with pytest.raises(BusyError):
        RankProbe(build("gpt2"), run)
    probe.close()
    assert {row["step"] for row in read_ranks(run)} == {0, 2}
    again = RankProbe(build("gpt2"), run, every=2)
    again.begin(0)
    again.close()
    assert {row["step"] for row in read_ranks(run)} == {0}


def test_a_folder_with_the_first_measurement_alone_is_free(tmp_path: Path) -> None:
    with RankProbe(build("gpt2"), tmp_path / "run", every=2):
        pass
    loop(tmp_path / "run", 0, 0.5)
    assert {row["step"] for row in read_ranks(tmp_path / "run")} == {0, 2, 4}


def test_a_model_of_two_towers_needs_one_for_a_folder(tmp_path: Path) -> None:
    model = build("clip")
    with pytest.raises(UsageError, match="text, vision"):
        RankProbe(model, tmp_path / "run")
    with pytest.raises(UsageError, match="'sound' is not one of text, vision"):
        RankProbe(model, tower="sound")
    probe = RankProbe(model, tmp_path / "run", tower="text", steps=1)
    assert {row["tower"] for row in probe.measure(0)} == {"text"}
    probe.close()
    assert len(read_ranks(tmp_path / "run")) == 16


def test_weights_that_are_not_finite_are_measured_as_such() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = math.nan
    rows = RankProbe(model).measure(0)
    assert {row["layer"] for row in rows if row["nonfinite"]} == {1}


@pytest.mark.parametrize("family", mostly_long("gpt_neox", "llama", "gpt2"))
def test_under_the_trainer(family: str, tmp_path: Path) -> None:
    """λ by zero gradients, the table by the saved model, the folder by the report's reader."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    from pretrain.api.trainer import RankCallback

    model = build_odd(family)
    before = {name: whole(one) for name, one in model.named_parameters()}
    groups = decay_groups(model, **WORDS)
    optimizer = groups.attach(torch.optim.AdamW(groups, lr=RATE))
    callback = RankCallback(decay=groups, every=2)
    tokens = torch.arange(16) % 64
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path), max_steps=STEPS, learning_rate=RATE, lr_scheduler_type="constant",
            logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
            per_device_train_batch_size=2,
        ),
        train_dataset=[{"input_ids": tokens, "labels": tokens}] * 20,
        optimizers=(optimizer, None),
        callbacks=[callback],
        compute_loss_func=lambda outputs, labels, **_: 0.0 * outputs.logits.sum(),
    )  # fmt: skip
    trainer.train()
    for name, parameter in model.named_parameters():
        difference = parameter.detach().double() - expected(name, before[name])
        assert difference.abs().max() <= 1e-6 * before[name].abs().max().clamp_min(1e-9), name
    trainer.save_model(str(tmp_path))
    measured = [row for row in read_ranks(tmp_path) if row["step"] == STEPS]
    wanted, _ = measure_weights(find_weights(str(tmp_path)), RanksConfig())
    assert_equal(measured, wanted)
    query = next(row for row in measured if row["product"] == "qk")
    assert query["exposure_b"] == pytest.approx(STEPS * RATE * WORDS["query"])
    (only,) = load_study([tmp_path]).runs
    assert only.config.train.steps == STEPS and len(only.metrics) == STEPS
    assert read_starts(tmp_path)[0]["precision"] == "fp32"


def test_the_trainer_continues_a_run_only_if_it_resumes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    from pretrain.api.trainer import RankCallback

    def train(steps: int, **resume: Any) -> None:
        tokens = torch.arange(16) % 64
        Trainer(
            build("gpt2"),
            TrainingArguments(
                str(tmp_path), max_steps=steps, logging_steps=1, save_steps=2, report_to=[],
                use_cpu=True, disable_tqdm=True,
            ),
            train_dataset=[{"input_ids": tokens, "labels": tokens}] * 20,
            callbacks=[RankCallback(every=2)],
        ).train(**resume)  # fmt: skip

    train(2)
    before = files_of(tmp_path)
    with pytest.raises(UsageError, match=r"up to step 2; .* Trainer that resumes"):
        train(4)
    assert files_of(tmp_path) == before
    train(4, resume_from_checkpoint=True)
    assert {row["step"] for row in read_ranks(tmp_path)} == {0, 2, 4}


@pytest.mark.long
def test_on_two_processes(tmp_path: Path) -> None:
    """DistributedDataParallel and fully_shard: decay and table as on one."""
    script = Path(__file__).with_name("sharded.py")
    done = run_processes([str(tmp_path / "answer.json")], 2, 300, script=script)
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads((tmp_path / "answer.json").read_text())
    assert len(answers) == 2 and len(answers[0]) == 6
    for answer in answers:
        for name, found in answer.items():
            assert found["decay"] < 1e-6 and found["ranks"] < 1e-6, (name, found)
    assert all(found["rows"] for found in answers[0].values())
    folders = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    assert len(folders) == 6 and all(load_study([folder]).runs for folder in folders)

"""docs/extending.md: a policy in the user's own file is trained, resumed, reported and pinned."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pretrain.checkpoint.reader import Checkpoint
from pretrain.config.recipe import load_config
from pretrain.decay.control import DecayControl
from pretrain.report import write_report
from pretrain.runs.folder import recipe_of
from pretrain.runs.metrics import read_metrics
from pretrain.sweep.config import load_sweep
from pretrain.sweep.run import code_words
from pretrain.training.setup import prepare
from tests.own_code import (
    COSINE,
    EXAMPLE,
    FILE,
    STABLE,
    layer_cosine,
    recipe_with,
    write_example,
)
from tests.tools import (
    assert_one_line,
    losses_of,
    metrics_of,
    pretrain,
    run,
    weights_of,
    write_recipe,
)

GRID = ("grid.tensor_parallel=2", "grid.pipeline_parallel=2")


@pytest.fixture(scope="module")
def home(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's files and a recipe, and three runs of it."""
    folder = tmp_path_factory.mktemp("extending")
    write_example(folder)
    recipe = str(write_recipe(folder / "r.yaml", recipe_with(data, COSINE, STABLE)))
    done = pretrain("train", recipe, "--out", str(folder / "one"))
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("grid", "again"):
        done = pretrain("train", recipe, *GRID, "--out", str(folder / name), processes=4)
        assert done.returncode == 0, done.stderr[-3000:]
        if name == "grid":  # as a kill in the last update leaves it
            shutil.copytree(folder / "grid", folder / "again")
            shutil.rmtree(folder / "again/checkpoints/step-00000006")
            (folder / "again/evaluation.json").unlink()
    return folder


def test_the_example_moves_the_decay_as_the_page_says(home: Path) -> None:
    for name in ("one", "grid"):
        rows = read_metrics(home / name)
        assert len(rows) == 6
        for row in rows:
            for role in ("query", "key", "value", "attention_output"):
                for layer in (0, 1):
                    wanted = 0.5 * layer_cosine(layer, 2, row["step"] - 1, 6)
                    found = row["weight_decay"][f"{role}[{layer}]"]
                    assert found == pytest.approx(wanted, rel=1e-12)
            assert row["weight_decay"]["embedding"] == 0.1
        stable = [row["weight_decay"][f"mlp_in[{layer}]"] for row in rows for layer in (0, 1)]
        assert all(0.05 < one < 0.2 and one != 0.1 for one in stable)
        # Every second update from the first on, and what is logged is the mean that is used.
        logged = read_metrics(home / name, "policy")
        assert [one["step"] for one in logged] == [0, 2, 4]
        assert logged[0]["policy"] == "stable.py:StableRank"
        mean = np.mean(list(logged[0]["stable_rank"].values()))
        assert rows[1]["weight_decay"]["mlp_in[1]"] == pytest.approx(
            0.1 * logged[0]["stable_rank"]["mlp_in[1]"] / mean
        )


def test_the_example_does_not_depend_on_the_grid(home: Path) -> None:
    one, grid = weights_of(home / "one"), weights_of(home / "grid")
    for name, values in one.items():
        if name.endswith("/master"):  # a λ of another layer would move it by 5e-4
            np.testing.assert_allclose(grid[name], values, rtol=1e-3, atol=3e-5, err_msg=name)
    np.testing.assert_allclose(losses_of(home / "grid"), losses_of(home / "one"), rtol=1e-5)


def test_the_example_resumes_bitwise(home: Path) -> None:
    assert metrics_of(home / "again") == metrics_of(home / "grid")
    assert read_metrics(home / "again", "policy") == read_metrics(home / "grid", "policy")
    whole, cut = weights_of(home / "grid"), weights_of(home / "again")
    assert all(np.array_equal(cut[name], values) for name, values in whole.items())
    states = [Checkpoint(home / name / "checkpoints/step-00000006").state["decay"]
              for name in ("grid", "again")]  # fmt: skip
    assert states[0] == states[1] and states[0]["policies"][1]["ranks"]


def test_a_run_pins_the_file(home: Path) -> None:
    digest = hashlib.sha256(EXAMPLE.encode()).hexdigest()
    copy = home / "grid" / "code" / digest[:16] / FILE
    assert copy.read_text() == EXAMPLE
    written = yaml.safe_load((home / "grid" / "config.yaml").read_text())
    entry = written["optimizer"]["weight_decay"]["policies"][0]
    assert entry == {**COSINE, "final": 0.1, "sha256": digest}
    manifest = json.loads((home / "grid/checkpoints/step-00000003/manifest.json").read_text())
    assert manifest["config"]["optimizer"]["weight_decay"]["policies"][0] == entry


def test_the_report_shows_it(home: Path, data: Path, tmp_path: Path) -> None:
    """Beside a run without it: as the condition's name, and with λ as applied."""
    study = write_report([home / "one", home / "grid"][:1], tmp_path / "one.html")
    (condition,) = study.conditions
    applied = [layer_cosine(layer, 2, step, 6) for step in range(6) for layer in (0, 1)]
    rates = [recipe_of(home / "one").learning_rate(step) for step in range(6) for _ in (0, 1)]
    wanted = 0.5 * np.dot(applied, rates) / np.sum(rates)
    assert condition.decay == pytest.approx(wanted, rel=1e-3)
    other = tmp_path / "without"
    shutil.copytree(home / "one", other)
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["optimizer"]["weight_decay"]["policies"].pop(0)
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    study = write_report([home / "one", other], tmp_path / "two.html")
    names = {one.name for one in study.conditions}
    assert any("layer_cosine.py:LayerCosine" in name for name in names) and len(names) == 2
    assert "layer_cosine.py:LayerCosine" in (tmp_path / "two.html").read_text()


def test_every_verb_takes_it(
    home: Path, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    recipe = str(home / "r.yaml")
    assert run(monkeypatch, "train", recipe, "--dry-run", "--json") == 0
    summary = json.loads(capfd.readouterr().out)
    (query,) = (one for one in summary["groups"] if one["name"] == "query")
    assert query["exposure"] is not None and query["weight_decay"] == 0.5
    assert any(str(home / FILE) in remark for remark in summary["remarks"])
    (mlp,) = (one for one in summary["groups"] if one["name"] == "mlp_in")
    assert mlp["exposure"] is None
    assert run(monkeypatch, "plan", recipe, "model.vocabulary_size=512", "--gpus", "1") == 0
    assert run(monkeypatch, "launch", recipe, "--print") == 0
    capfd.readouterr()
    words = ("launch", str(home / "grid/config.yaml"), "--print")
    files = ("--code", str(home / FILE), "--code", str(home / "sub/stable.py"))
    assert run(monkeypatch, *words, *GRID, "--processes", "4", *files) == 0
    printed = capfd.readouterr().out
    assert f"--code {home / FILE}" in printed


def test_a_sweep_takes_it(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points with and without it; the words of a run train it, from the sweep's own recipes."""
    from pretrain.sweep import run as sweep_run

    sweep = {
        "recipe": str(home / "r.yaml"),
        "seeds": [1],
        "set": {"train.steps": 2},
        "grid": {"optimizer.weight_decay.policies": [[], [COSINE], [COSINE, STABLE]]},
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(sweep))
    found = load_sweep(tmp_path / "s.yaml", tmp_path / "out")
    names = [task.name for task in found.tasks]
    assert "/" not in "".join(names) and "layer_cosine.py_LayerCosine" in names[1]
    assert [len(code_words(task)) for task in found.tasks] == [0, 2, 4]
    for path, text in sweep_run._files(found, tmp_path / "out").items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    job = sweep_run._job(found.tasks[2], tmp_path / "out", 1)
    assert run(monkeypatch, *job.words) == 0
    logged = read_metrics(found.tasks[2].run)
    assert logged[-1]["weight_decay"]["query[1]"] == pytest.approx(0.5 * layer_cosine(1, 2, 1, 2))


# --- another file ---------------------------------------------------------------------------


def test_a_changed_file_is_refused_until_one_is_chosen(
    home: Path, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write_example(tmp_path)
    recipe = write_recipe(tmp_path / "r.yaml", recipe_with(data, COSINE, STABLE))
    shutil.copytree(home / "one", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")
    (tmp_path / FILE).write_text(EXAMPLE.replace("0.5 * (1 +", "0.25 * (1 +"))
    old, new = (hashlib.sha256(text.encode()).hexdigest()
                for text in (EXAMPLE, (tmp_path / FILE).read_text()))  # fmt: skip
    words = ("train", str(recipe), "--out", str(tmp_path / "run"))
    assert run(monkeypatch, *words) == 2
    text = capfd.readouterr().err
    copy = tmp_path / "run" / "code" / old[:16] / FILE
    assert_one_line(text, (f"{old} -> {new}", "resume.decay=recipe", f"--code {copy}"))
    # A process of its own each: what ran in this one, runs on.
    before = (*words, "resume.decay=checkpoint")
    done = pretrain(*before)
    assert done.returncode == 2
    assert_one_line(done.stderr, ("resume.decay", old, "--code"))
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "run", kept)
    done = pretrain(*before[:-2], str(kept), before[-1], "--code", str(copy))
    assert done.returncode == 0, done.stderr[-2000:]
    assert metrics_of(kept) == metrics_of(home / "one")
    assert run(monkeypatch, *words, "resume.decay=recipe") == 0
    last = read_metrics(tmp_path / "run")[-1]["weight_decay"]["query[0]"]
    assert last != read_metrics(kept)[-1]["weight_decay"]["query[0]"]
    assert (tmp_path / "run" / "code" / new[:16] / FILE).is_file() and copy.is_file()


def test_a_pin_in_the_recipe_is_held(data: Path, tmp_path: Path) -> None:
    write_example(tmp_path)
    pin = hashlib.sha256(EXAMPLE.encode()).hexdigest()
    recipe = write_recipe(tmp_path / "r.yaml", recipe_with(data, {**COSINE, "sha256": pin}))
    assert load_config(recipe, code=[]).optimizer.weight_decay.policies[0].kind == COSINE["kind"]
    other = "0" * 64
    recipe = write_recipe(tmp_path / "r.yaml", recipe_with(data, {**COSINE, "sha256": other}))
    words = rf"policies\[0\]\.kind: .*{pin}, but the recipe needs {other}"
    with pytest.raises(ValueError, match=words):
        load_config(recipe, code=[])


# --- packages, and earlier versions -----------------------------------------------------------


def test_a_policy_of_a_package(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point: found, pinned by name and version, and refused under another version."""
    from pretrain.decay.registry import POLICIES

    site = tmp_path / "site"
    site.mkdir()
    (site / "my_cosine.py").write_text(EXAMPLE)
    monkeypatch.syspath_prepend(str(site))

    def install(version: str) -> None:
        shutil.rmtree(site / "my_cosine.dist-info", ignore_errors=True)
        info = site / "my_cosine.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: my-cosine\nVersion: {version}\n"
        )
        (info / "entry_points.txt").write_text(
            f"[{POLICIES.group}]\nmine = my_cosine:LayerCosine\n"
        )

    install("1.2")
    entry = {"kind": "mine", "roles": ["attention"]}
    recipe = write_recipe(tmp_path / "r.yaml", recipe_with(data, entry))
    config = load_config(recipe, code=[])
    kept = config.optimizer.weight_decay.policies[0].model_dump()
    assert kept == {**entry, "deepest": 2.0, "final": 0.1, "package": "my-cosine 1.2"}
    setup = prepare(config, 1)
    control = DecayControl(setup.config, setup.plan)
    last = max(site for site in control.base if site[0].value == "query")
    assert control.now(last).decay == 0.5 * 2
    install("1.3")
    (now,) = load_config(recipe, code=[]).optimizer.weight_decay.policies
    assert now.model_dump() == {**kept, "package": "my-cosine 1.3"}
    recipe = write_recipe(tmp_path / "r.yaml", recipe_with(data, kept))
    with pytest.raises(
        ValueError, match=r"my-cosine 1\.3 here, but the recipe needs my-cosine 1\.2"
    ):
        load_config(recipe, code=[])


STATES: dict[str, Any] = json.loads((Path(__file__).parent / "policy_states.json").read_text())
"""Recipes, states after six updates and λ in the seventh, as commit 2c30cc3 of 25 November 2026
wrote them, where each policy was a branch of the control."""
SMALL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "context": 16,
         "vocabulary_size": 300}  # fmt: skip


@pytest.mark.parametrize("case", STATES)
def test_states_of_earlier_checkpoints_are_taken_up(case: str) -> None:
    from models.config import GPTConfig
    from models.gpt import whole_model
    from pretrain.config.recipe import parse_config
    from pretrain.decay.plan import plan_decay
    from pretrain.decay.sites import label

    before = STATES[case]
    config = parse_config({"model": SMALL, "train": {"steps": 20}, "optimizer": {
        "learning_rate": 0.01, "weight_decay": before["decay"]}})  # fmt: skip
    plan = plan_decay(whole_model(GPTConfig(**SMALL)), config.optimizer.weight_decay)
    control = DecayControl(config, plan)
    control.restore(before["state"], same_policies=True)
    control.begin(6, before["rate"])
    by_label = {label(site): site for site in control.base}
    for name, (decay, shrink) in before["now"].items():
        applied = control.now(by_label[name])
        assert applied.decay == decay, name
        # In those days a nuclear step counted as one update, however many it stood for.
        assert applied.times > 1 or applied.shrink == shrink, name
    # And what it writes is what it took up, but for λ of the last update.
    again = json.loads(json.dumps(control.state()))
    assert again["policies"] == before["state"]["policies"]
    assert {name: book[1:] for name, book in again["books"].items()} == {
        name: book[1:] for name, book in before["state"]["books"].items()
    }

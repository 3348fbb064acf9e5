"""What a launch says before it submits, and the plans in the comments of the large recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from launchers.site import Site
from pretrain.cluster.announce import gpu_of
from pretrain.cluster.plan import choose
from pretrain.cluster.plan_words import with_plan
from pretrain.config.recipe import parse_config
from pretrain.engine.accelerators import DEVICES
from tests.tools import ROOT, run, write_recipe

pytestmark = pytest.mark.slow

PLANNED = sorted(
    path for path in (ROOT / "configs").glob("*.yaml") if "# Planned by" in path.read_text()
)
LARGE = ("paper-125m", "pythia-410m", "pythia-1b", "pythia-1.4b", "pythia-2.8b", "pythia-6.9b",
         "pythia-12b", "llama-2-7b", "llama-3-8b")  # fmt: skip
SMALL = {
    "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "context": 128},
    "train": {"steps": 3600, "global_batch": 64},
}


def test_the_large_recipes_have_a_plan() -> None:
    assert {path.stem for path in PLANNED} >= set(LARGE)


@pytest.mark.parametrize("recipe", PLANNED, ids=lambda path: path.stem)
def test_planned_comments_are_current(recipe: Path) -> None:
    again = "run: python -m pretrain.cluster.plan_words configs/*.yaml"
    assert with_plan(recipe) == recipe.read_text(), again


def launch(monkeypatch: pytest.MonkeyPatch, folder: Path, site: dict[str, Any], *words: str) -> int:
    monkeypatch.chdir(folder)
    recipe = write_recipe(folder / "recipe.yaml", SMALL)
    file = write_recipe(folder / "site.yaml", site)
    return run(
        monkeypatch, "launch", str(recipe), "--site", str(file), "--on", "slurm", "--print", *words
    )


def test_a_launch_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = {"nodes": 2, "gpus_per_node": 4, "gpu": "a100", "gpu_hour_price": 2.5}
    size = "model.vocabulary_size=1024"
    assert launch(monkeypatch, tmp_path, site, size) == 0
    shown = capsys.readouterr()
    assert "planned" not in shown.out and "#SBATCH" in shown.out
    config = parse_config({**SMALL, "model": {**SMALL["model"], "vocabulary_size": 1024}})
    choice = choose(config, DEVICES["a100"], 8)
    hours = choice.seconds["step"] * 3600 / 3600  # so many updates
    assert shown.err.startswith(
        "planned for 8 x a100: tensor 1 x pipeline 1 x data 8, ZeRO 1, micro batch 8: "
    )
    assert f" {choice.seconds['step']:.3g} s a step" in shown.err
    assert f", {8 * hours * 2.5:.2g} at 2.5 a GPU hour" in shown.err
    assert len(shown.err.strip().splitlines()) == 1
    assert launch(monkeypatch, tmp_path, {"nodes": 2, "gpus_per_node": 4}, size) == 0
    error = capsys.readouterr().err
    assert "planned for 8 x h100 (assumed; the site file's key gpu" in error and " at " not in error
    assert launch(monkeypatch, tmp_path, {"nodes": 2}, size) == 0  # no GPUs, no plan
    assert not capsys.readouterr().err


def test_a_grid_that_does_not_fit_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that fits is named, and choosing it is enough."""
    site = {"nodes": 1, "gpus_per_node": 8, "gpu": "l40s"}
    large = ("model.num_layers=24", "model.hidden_size=4096", "model.num_attention_heads=32",
             "model.vocabulary_size=1024", "model.context=2048")  # fmt: skip
    assert launch(monkeypatch, tmp_path, site, *large) == 0
    first, second = capsys.readouterr().err.strip().splitlines()
    assert first.startswith("planned for 8 x l40s: ")
    assert "this grid does not fit into 48 GB; this fits: grid.tensor_parallel=" in second
    words = second.partition("this fits: ")[2].split()
    assert launch(monkeypatch, tmp_path, site, *large, *words) == 0
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert launch(monkeypatch, tmp_path, site, *large, "model.hidden_size=65536") == 0
    assert "no grid of these GPUs fits" in capsys.readouterr().err


def test_what_cannot_be_planned_is_still_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = {"nodes": 1, "gpus_per_node": 8}
    assert launch(monkeypatch, tmp_path, site, "data.path=nowhere") == 0
    shown = capsys.readouterr()
    assert "data.path: nowhere: there is no data, so 50,304 tokens" in shown.err
    assert "planned for 8 x h100" in shown.err and "#SBATCH" in shown.out
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/manifest.json").write_text("{")
    assert launch(monkeypatch, tmp_path, site, "data.path=damaged") == 0
    shown = capsys.readouterr()
    assert "not planned: " in shown.err and "#SBATCH" in shown.out


def test_the_gpu_of_a_site() -> None:
    names = get_args(Site.model_fields["gpu"].annotation)
    assert set(names) - {""} == set(DEVICES)
    assert gpu_of(Site.model_validate({"gpu": "b200"})) == ("b200", "")
    spoken = Site.model_validate({"skypilot": {"accelerators": "A100:8"}})
    assert gpu_of(spoken) == ("a100", "")
    assert gpu_of(Site.model_validate({"skypilot": {"accelerators": "TPU:8"}}))[1]

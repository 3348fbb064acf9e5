"""The dry run says which checkpoints stay and what is evaluated, which surprises people."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from pretrain.checkpoint.retention import superseded
from pretrain.cluster.dry_run import _kept
from pretrain.config.recipe import Config, apply_overrides
from tests.tools import base_recipe, run, write_recipe


@pytest.mark.parametrize(
    ("keep", "keep_every", "best"), itertools.product((0, 1, 3), (0, 40), (True, False))
)
def test_what_is_kept_is_what_retention_keeps(keep: int, keep_every: int, best: bool) -> None:
    """Of the checkpoints of a run, the rules leave those that the sentence names."""
    words = ["train.steps=100", "checkpoint.every=10", "evaluation.every=10",
             f"checkpoint.keep={keep}", f"checkpoint.keep_every={keep_every}",
             f"checkpoint.keep_best={str(best).lower()}"]  # fmt: skip
    config = apply_overrides(Config(), words)
    said = _kept(config)
    steps = range(10, 101, 10)
    paths = [Path(f"step-{step:08}") for step in steps]
    losses = dict.fromkeys(paths, 2.0) | {paths[2]: 1.0}
    left = set(paths) - set(superseded(paths, config.checkpoint, losses.__getitem__))
    named = set(paths)
    if keep:
        named = set(paths[-int(re.findall(r"the last (\d+)", said)[0]) :])
        if "multiples of 40" in said:
            named |= {path for path, step in zip(paths, steps, strict=True) if step % 40 == 0}
        if "the best" in said:
            named.add(paths[2])
    assert left == named and said.startswith("every 10 steps; ")


@pytest.mark.parametrize("at_end", ["none", "sample", "all"])
def test_what_is_evaluated(
    at_end: str, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    recipe = str(write_recipe(tmp_path / "recipe.yaml", base_recipe(data)))
    assert run(monkeypatch, "train", recipe, f"evaluation.at_end={at_end}", "--dry-run") == 0
    shown = capsys.readouterr().out
    end = {"none": "nothing", "sample": "the same", "all": "all of test"}[at_end]
    (line,) = [line for line in shown.splitlines() if line.startswith("evaluation: ")]
    assert line.startswith("evaluation: a sample of 6 documents of val every 3 steps; ")
    assert end in line and "at the end" in line
    assert run(monkeypatch, "train", recipe, "--dry-run", "--json") == 0
    assert "\nattention: a token sees all earlier documents of its sequence" in shown
    assert {"kept", "scored", "attention"} <= json.loads(capsys.readouterr().out).keys()

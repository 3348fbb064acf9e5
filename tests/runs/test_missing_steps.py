"""A step that a run does not have: the message says which it has, and the key that decides it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.checkpoint.reader import checkpoint_name
from pretrain.config.recipe import dump_config, parse_config
from pretrain.errors import UsageError
from pretrain.runs.folder import resolve_checkpoint
from tests.fake_runs import recipe


@pytest.mark.parametrize(
    ("every", "keep", "there", "wanted", "named"),
    [
        (10, 2, (30, 40), "20", "checkpoint.keep: older ones than the last 2"),
        (10, 2, (30, 40), "25", "checkpoint.every: it saves every 10"),
        (0, 1, (40,), "4", "checkpoint.keep"),  # the default: a tenth of 40 steps
        (0, 1, (40,), "5", "checkpoint.every: it saves every 4"),
        (10, 0, (10, 20), "15", "checkpoint.every"),
        (10, 0, (10, 20), "30", ""),  # not trained so far
        (10, 2, (30, 40), "0", ""),
        (10, 2, (30, 40), "best", ""),
    ],
)
def test_the_reason_is_named(
    every: int, keep: int, there: tuple[int, ...], wanted: str, named: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for step in there:
        (run / "checkpoints" / checkpoint_name(step)).mkdir(parents=True)
        (run / "checkpoints" / checkpoint_name(step) / "manifest.json").write_text("{}")
    config = parse_config(recipe(checkpoint__every=every, checkpoint__keep=keep))
    (run / "config.yaml").write_text(dump_config(config))
    message = f"no such step; the run has {', '.join(map(str, there))}"
    with pytest.raises(UsageError, match=message) as caught:
        resolve_checkpoint(f"{run}@{wanted}")
    assert named in str(caught.value) and ("(" in str(caught.value)) == bool(named)
    (run / "config.yaml").write_text("model: [")
    with pytest.raises(UsageError, match=message + "$"):
        resolve_checkpoint(f"{run}@{wanted}")

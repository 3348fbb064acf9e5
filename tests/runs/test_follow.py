"""What is followed of a file that grows, is cut, goes back and is damaged equals what it says."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest

from pretrain.runs.follow import Follower, Present, Speed, in_words
from pretrain.runs.metrics import METRICS, rewind_metrics


def line(rng: random.Random, step: int) -> str:
    kind = rng.choice(("train", "train", "train", "ranks", "evaluation", "event", "later-kind"))
    values: dict[str, dict[str, Any]] = {
        "train": {"loss": rng.choice((rng.random(), None)), "learning_rate": 0.1, "grad_norm": 1.0,
                  "tokens_per_second": rng.uniform(1, 100), "seconds": rng.uniform(0.1, 2),
                  "weight_decay": {"query": 0.5}},
        "ranks": {"pseudo_rank_qk": rng.random(), "pseudo_rank_vp": rng.random()},
        "evaluation": {"loss": rng.random()},
        "event": {"message": "λ went up"},
    }  # fmt: skip
    return json.dumps({"kind": kind, "step": step, **values.get(kind, {})}) + "\n"


DAMAGED = ("{\n", "[]\n", '{"kind": "train"}\n', '{"kind": 3, "step": 1}\n', "\x00\n",
           '{"kind": "event", "step": 1}\n', "[" * 5000 + "\n")  # fmt: skip


def by_hand(text: str) -> dict[str, Any]:
    """What whole lines say, without the code that follows them."""
    found: dict[str, Any] = {"damaged": 0, "step": 0, "ranks": {}, "held": {}, "pairs": []}
    for one in text.split("\n")[:-1]:
        if f"{one}\n" in DAMAGED:
            found["damaged"] += 1
            continue
        row = json.loads(one)
        if row["kind"] == "train":
            found["step"] = row["step"]
            found["loss"] = row["loss"]
            found["pairs"].append((row["tokens_per_second"] * row["seconds"], row["seconds"]))
        elif row["kind"] in ("ranks", "evaluation"):
            found["ranks" if row["kind"] == "ranks" else "held"] = row
    return found


def agree(present: Present, found: dict[str, Any], tail: bool) -> None:
    assert present.step == found["step"]
    assert (present.ranks, present.held_out) == (found["ranks"], found["held"])
    if "loss" in found:
        assert present.loss is not None
        assert present.loss == found["loss"] or math.isnan(present.loss) == (found["loss"] is None)
    recent = found["pairs"][-20:]
    speed = sum(one for one, _ in recent) / sum(one for _, one in recent) if recent else 0.0
    assert present.speed.value == pytest.approx(speed)
    assert tail or present.damaged == found["damaged"]


@pytest.mark.parametrize("seed", range(8))
def test_every_look_shows_the_whole_lines_so_far(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    path, step, waiting = tmp_path / METRICS, 0, ""
    followers = [Follower(tmp_path, whole=True), Follower(tmp_path)]
    for follower in followers:
        assert follower.look().step == 0 and not follower.present.update  # there is no file yet
    for _ in range(30):
        if rng.random() < 0.1 and path.exists():  # a run goes back: another file, the same name
            kept = [one for one in path.read_text().splitlines(True) if one not in DAMAGED]
            path.write_text("".join(kept))
            step, waiting = rng.randrange(step + 1), ""
            rewind_metrics(tmp_path, step)
        else:
            added = waiting + "".join(
                line(rng, (step := step + 1)) if rng.random() < 0.9 else rng.choice(DAMAGED)
                for _ in range(rng.randrange(1, 40))
            )
            with path.open("a") as file:
                file.write(added)
            waiting = ""
        text = path.read_text()
        if rng.random() < 0.5:  # a part of the next line is there, and is taken away again
            waiting = line(rng, (step := step + 1))
            with path.open("a") as file:
                file.write(waiting[: rng.randrange(1, len(waiting))])
        for follower in followers:
            if rng.random() < 0.7:
                agree(follower.look(), by_hand(text), tail=not follower._whole)
        os.truncate(path, len(text.encode()))


def test_the_tail_of_a_long_file_finds_the_last_measurement(tmp_path: Path) -> None:
    rng = random.Random(0)
    first = json.dumps({"kind": "ranks", "step": 0, "pseudo_rank_qk": 0.25, "pseudo_rank_vp": 0.5})
    rows = [{"kind": "train", "step": step, "loss": rng.random(), "note": "x" * 300}
            for step in range(1, 9000)]  # fmt: skip
    later = "\n".join(map(json.dumps, rows))
    (tmp_path / METRICS).write_text(
        f'{{"kind": "event", "step": 0, "message": ""}}\n{first}\n{later}\n'
    )
    assert (tmp_path / METRICS).stat().st_size > 2 << 20
    present = Follower(tmp_path).look()
    assert present.step == 8999 and in_words(present.ranks) == "0.250/0.500"
    assert len(present.losses) < 1000 and present.damaged == 0


def test_the_speed_is_weighted_by_time() -> None:
    speed = Speed()
    assert speed.value == 0.0
    for tokens, seconds in ((100.0, 1.0), (100.0, 3.0), (math.nan, 1.0), (1.0, 0.0)):
        speed.add(tokens, seconds)
    assert speed.value == 50.0
    for _ in range(20):
        speed.add(7.0, 1.0)
    assert speed.value == 7.0


def test_words_of_ranks() -> None:
    assert in_words({}) == ""
    assert in_words({"pseudo_rank_qk": 0.66912, "pseudo_rank_vp": None}) == "0.669/nan"

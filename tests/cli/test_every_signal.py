"""Every verb x SIGINT, SIGTERM, SIGUSR1 x ten moments x one process or several.

A signal ends a verb with the code that launchers read and one line; no process is left, no lock is
held, every checkpoint is whole, nothing half written lies about, and the same words go on.
"""

from __future__ import annotations

import fcntl
import random
import re
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.checkpoint.reader import Checkpoint, list_checkpoints
from pretrain.errors import INTERRUPTED, TRY_AGAIN, RunError
from tests.kit import Kit, ask_forks
from tests.runs.test_writing_pairs import PAPER, VERBS
from tests.tools import write_recipe
from tests.verbs import all_verbs

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
READ_ONLY = ["plan", "watch", "data check", "data info", "doctor"]
SEVERAL = ["train --processes 2", "sweep --processes 2", "doctor --processes 2",
           "data tokenize --workers 2"]  # fmt: skip
MATRIX = [*VERBS, *PAPER, *READ_ONLY, *SEVERAL]
SAMPLE = ["import", "paper fig2"]
UNFINISHED = re.compile(r"\.tmp$|\.writing$|^\..+\.(export|import|adopt)-[0-9a-f]+$")
"""Names of what is being written; of a process that ended by itself nothing of the kind is left."""


def words_of(verb: str, kit: Kit, out: Path) -> list[str]:
    """The words of any verb, of those that write ``out`` and of others."""
    recipe, data = str(kit.recipes[0]), str(kit.data)
    if verb == "sweep --processes 2":
        values = yaml.safe_load(kit.sweeps[0].read_text())
        values |= {"recipe": recipe, "processes": 2}
        # Not in the place, which is emptied for another try.
        sweep = write_recipe(kit.sweeps[0].with_name("of-two-processes.yaml"), values)
        return ["sweep", str(sweep), "--out", str(out)]
    doctor = ["doctor", recipe, "--out", str(out)]
    own = {
        "watch": ["watch", str(kit.runs[0])],
        "plan": ["plan", recipe, "--gpus", "8", "model.vocabulary_size=50304"],
        "data check": ["data", "check", data],
        "data info": ["data", "info", data],
        "doctor": doctor,
        "doctor --processes 2": [*doctor, "--processes", "2"],
        "train --processes 2": [*kit.words("train", 0, out), "--processes", "2"],
        "data tokenize --workers 2": [*kit.words("data tokenize", 0, out), "--workers", "2"],
    }
    return own[verb] if verb in own else kit.words(verb, 0, out)


def test_every_verb_is_there() -> None:
    told = {verb.split(" --")[0].removesuffix(" csv").removesuffix(" md") for verb in MATRIX}
    assert told == all_verbs()


@pytest.mark.parametrize("verb", SAMPLE)
def test_a_signal(verb: str, kit: Kit, tmp_path: Path) -> None:
    _, wrong = disturb(verb, 2, kit, tmp_path)
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.long
@pytest.mark.parametrize("verb", MATRIX)
def test_every_signal_at_ten_moments(verb: str, kit: Kit, tmp_path: Path) -> None:
    happened, wrong = disturb(verb, 10, kit, tmp_path)
    print("\nverb", verb, dict(happened), "wrong:", len(wrong))
    assert not wrong, "\n\n".join(wrong)


def disturb(verb: str, moments: int, kit: Kit, folder: Path) -> tuple[Counter[str], list[str]]:
    """Each signal at so many moments of a verb; how often it ended with which code, and what was
    wrong."""
    rng = random.Random(verb)
    kinds: list[dict[str, Any]] = [{"signal": None, "moment": 0.0, "group": False, "again": False}]
    for number in SIGNALS:
        for turn in range(moments):
            kinds.append({
                "signal": int(number), "moment": (turn + rng.random()) / moments,
                # Ctrl-C of a terminal and a scheduler's signals come to every process of a job.
                "group": turn % 2 == 1,
                "again": turn % 5 == 2 or moments < 5,
            })  # fmt: skip
    places = [folder / f"place{number}" for number in range(len(kinds))]
    trials = []
    for kind, place in zip(kinds, places, strict=True):
        place.mkdir()
        words = words_of(verb, kit, place / "x")
        trials.append({
            **kind, "verb": verb, "words": words, "place": str(place), "started": verb in SEVERAL
        })  # fmt: skip
    answers = ask_forks("disturbed", trials, kit, folder, 60)
    happened: Counter[str] = Counter()
    wrong = []
    for trial, answer, place in zip(trials, answers, places, strict=True):
        found = [*faults(trial, answer, answers[0]), *left_in(place)]
        if found:
            wrong.append(f"{found} {trial} {answer}")
        if trial["signal"] is not None:
            name = signal.Signals(trial["signal"]).name
            told = f"{name} {answer['code']}" if answer["sent"] else "ended before"
            happened[told + (", again" if answer["again"] is not None else "")] += 1
        shutil.rmtree(place)
    return happened, wrong


def faults(trial: dict[str, Any], answer: dict[str, Any], usual: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the end of a command."""
    if answer["orphans"]:
        yield "orphans"
    if "Traceback" in answer["stderr"]:
        yield "a traceback"
    if trial["signal"] is None:
        if answer["code"] not in (0, 1):
            yield "the code without a signal"
        return
    asked = INTERRUPTED if trial["signal"] == signal.SIGINT else TRY_AGAIN
    if answer["code"] not in (usual["code"], asked):
        yield "the code"
    if answer["code"] == usual["code"] and answer["after"] > 0.15 + 0.3 * usual["cpu"]:
        yield "it went on"
    if answer["code"] == asked and _errors(answer["stderr"].split("\nAGAIN:\n")[0]) > 1:
        yield "more than one error"
    if answer["again"] not in (None, usual["code"]):
        yield "the code of the same words again"


def _errors(said: str) -> int:
    return sum(
        line.startswith(("error: ", "interrupted;"))
        or ("stopped by SIG" in line and "rerun" in line)
        for line in said.splitlines()
    )


def left_in(place: Path) -> Iterator[str]:
    """Files that are half written, locks that are held, and checkpoints that are not whole."""
    for path in sorted(place.rglob("*")):
        if UNFINISHED.search(path.name):
            yield f"{path} is left"
        if path.name.startswith(".") and path.name.endswith(".lock"):
            try:
                with path.open() as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield f"{path} is held"
        if path.name == "checkpoints":
            for one in list_checkpoints(path):
                try:
                    Checkpoint(one)
                except RunError as error:
                    yield str(error)

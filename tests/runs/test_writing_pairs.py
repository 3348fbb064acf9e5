"""Two verbs that write one place, started at one moment: every pair of all that write.

Whoever says 0 has its result, whole and as if it had been alone, or as after the other; whoever
does not says why in one line and leaves nothing. Compared are whole folders, file by file.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from data_pipeline.files import held
from tests.kit import Kit, ask_forks
from tests.tools import ROOT as REPOSITORY
from tests.tools import TIMED, assert_one_line, environment, run
from tests.verbs import all_verbs

WRITE_NOTHING = {"plan", "watch", "data check", "data info", "doctor"}
"""`doctor` writes a file under a random name and deletes it."""
VERBS = [
    "train", "evaluate", "export", "import", "ranks", "ranks --figures", "sweep", "report",
    "report csv", "report md", "launch", "launch --on slurm", "demo", "data corpus",
    "data tokenizer", "data tokenize", "data adopt", "paper fig4", "paper fig5",
]  # fmt: skip
PAPER = [
    "paper fig1", "paper fig2", "paper fig3", "paper fig7", "paper table1", "paper fig3-vit",
    "paper fig6", "paper modern", "paper rank-cost", "paper all",
]  # fmt: skip
"""They hold the same kind of lock as the two figures above, which meet every verb; so they meet
themselves, and `paper all`, which makes them."""
PAIRS = [
    *combinations_with_replacement(VERBS, 2),
    *((verb, verb) for verb in PAPER),
    *((verb, "paper all") for verb in (*PAPER[:-1], "paper fig4", "paper fig5")),
]
SAMPLE = [
    ("data adopt", "data adopt"), ("ranks", "ranks"), ("launch --on slurm", "launch --on slurm"),
    ("demo", "demo"),
    ("paper table1", "paper all"), ("sweep", "sweep"),
    ("train", "train"), ("report", "report csv"),
]  # fmt: skip
VOLATILE = re.compile(
    r"(^|/)(\.lock|run-id|environment\.json|latest|identity\.json)$|/logs/|\.log$|tfevents"
)


class Places:
    """Folders of trials; each verb writes ``x`` in one of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def new(self) -> Path:
        """The path that the next trial writes."""
        self.count += 1
        place = self.folder / f"place{self.count:05d}"
        place.mkdir()
        return place / "x"


def tree(out: Path) -> dict[str, Any]:
    """What lies in a trial's folder, without what clocks, chance and the folder's name decide."""
    place = out.parent
    found: dict[str, Any] = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if path.is_file() and not VOLATILE.search(name):
            found[name] = _content(path, place.name)
    return found


def _content(path: Path, place: str) -> Any:
    if "checkpoints/step-" in str(path) and path.name == "manifest.json":
        return "manifest"
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            return {name: file.get_tensor(name).tobytes() for name in list(file.keys())}
    data = path.read_bytes()
    if path.name == "metrics.jsonl":
        rows = [json.loads(line) for line in data.splitlines()]
        return [{key: row[key] for key in row if key not in (*TIMED, "time")} for row in rows]
    if path.parent.name == "launch":  # the job's name has a digest of the folder's
        data = re.sub(rb"-[0-9a-f]{6,}", b"-digest", data)
    return data.replace(place.encode(), b"place00000")


Command = dict[str, Any]
Answer = list[dict[str, Any]]
Ending = tuple[int, dict[str, Any]]
"""The exit code of a verb that ran alone, and what it left."""
Order = tuple[str, list[int], dict[str, Any]]
"""Its name, the exit codes of two verbs that ran one after the other, and what they left."""


class Trials:
    """Pairs of verbs, started together; what a verb leaves alone is found out once."""

    def __init__(self, kit: Kit, places: Places) -> None:
        self.kit, self.places = kit, places
        self._alone: dict[tuple[str, int], Ending] = {}
        self._seconds: dict[tuple[str, int], float] = {}
        self._rng = random.Random(1)

    def run(self, pairs: list[tuple[str, str]], count: int, real: bool = False) -> None:
        """Each pair together so often; prints what happened: who was refused, or the order.

        Args:
            real: start new interpreters instead of forks.

        Raises:
            AssertionError: with all that went wrong.
        """
        self._find_alone(pairs)
        tried = [(pair, self.places.new(), number) for pair in pairs for number in range(count)]
        commands = [self._together(*one) for one in tried]
        answers = _started(commands) if real else self._answers(commands)
        found = [tree(out) for _, out, _ in tried]
        told: list[str | None] = [
            _or_wrong(partial(self._refused, pair, answer, left, out))
            for (pair, out, _), answer, left in zip(tried, answers, found, strict=True)
        ]
        both_wrote = [number for number, one in enumerate(told) if one is None]
        orders = self._in_turn(sorted({tried[number][0] for number in both_wrote}))
        for number in both_wrote:
            pair = tried[number][0]
            told[number] = _or_wrong(
                partial(self._in_order, pair, answers[number], found[number], orders[pair])
            )
        for _, out, _ in tried:
            shutil.rmtree(out.parent)
        happened = Counter(
            (pair, str(name)) for (pair, _, _), name in zip(tried, told, strict=True)
        )
        for (pair, name), times in sorted(happened.items()):
            print("\npair", " + ".join(pair), ":", times, "x", name, flush=True)
        assert not any(name.startswith(_WRONG) for _, name in happened)

    def _answers(self, rounds: list[list[Command]]) -> list[Answer]:
        return ask_forks("together", rounds, self.kit, self.places.folder, 10) if rounds else []

    def _together(self, pair: tuple[str, str], out: Path, number: int) -> list[Command]:
        """At one moment; every second time one of them while the other is under way."""
        commands: list[Command] = [{"words": self.kit.words(pair[who], who, out)} for who in (0, 1)]
        if number % 2:
            late = self._rng.randrange(2)
            other = (pair[1 - late], 1 - late)
            commands[late]["delay"] = self._rng.uniform(0.0, self._seconds[other])
        return commands

    def _find_alone(self, pairs: list[tuple[str, str]]) -> None:
        wanted = {(verb, who) for pair in pairs for who, verb in enumerate(pair)}
        new = [(*one, self.places.new()) for one in sorted(wanted - self._alone.keys())]
        answers = self._answers([[{"words": self.kit.words(*one)}] for one in new])
        for (verb, who, out), (answer,) in zip(new, answers, strict=True):
            assert "Traceback" not in answer["stderr"], answer
            self._alone[verb, who] = answer["code"], tree(out)
            self._seconds[verb, who] = answer["seconds"]

    def _in_turn(self, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], list[Order]]:
        """What each pair leaves one after the other, in both orders."""
        outs = {(pair, first): self.places.new() for pair in pairs for first in (0, 1)}
        rounds: list[list[Command]] = [
            [{"words": self.kit.words(pair[who], who, out)}]
            for (pair, first), out in outs.items() for who in (first, 1 - first)
        ]  # fmt: skip
        answers = iter(self._answers(rounds))
        found: dict[tuple[str, str], list[Order]] = {pair: [] for pair in pairs}
        for (pair, first), out in outs.items():
            codes = [0, 0]
            for who in (first, 1 - first):
                codes[who] = next(answers)[0]["code"]
            name = f"{pair[first]}, then {pair[1 - first]}"
            found[pair].append((name, codes, tree(out)))
        return found

    def _refused(
        self, pair: tuple[str, str], answer: Answer, found: dict[str, Any], out: Path
    ) -> str | None:
        codes = [one["code"] for one in answer]
        said = "\n".join(one["stderr"] for one in answer)
        assert "Traceback" not in said, (pair, said)
        for who in (0, 1):
            wanted, whole = self._alone[pair[who], who]
            if codes[who] != wanted or codes[1 - who] not in (1, 2):
                continue
            same = found == whole
            if pair[1 - who] == "paper all":  # it makes the other figures
                whole = self._alone[pair[1 - who], 1 - who][1]
                same = found.keys() == whole.keys() and _differing(found, whole) <= {"x/paper.md"}
            errors = [line for line in answer[1 - who]["stderr"].splitlines()
                      if line.startswith("error: ")]  # fmt: skip
            usual = codes[1 - who] == self._alone[pair[1 - who], 1 - who][0]
            if usual and not any("another process" in line for line in errors):
                continue  # it ended as it does alone
            if same:
                assert len(errors) == 1 and str(out) in errors[0], (pair, errors)
                return f"{pair[1 - who]} refused"
        return None

    def _in_order(
        self, pair: tuple[str, str], answer: Answer, found: dict[str, Any], orders: list[Order]
    ) -> str:
        codes = [one["code"] for one in answer]
        lost = []
        for name, wanted, whole in orders:
            if codes == wanted and found == whole:
                return name
            lost.append((name, wanted, sorted(_differing(found, whole))))
        for who in (0, 1):
            code, whole = self._alone[pair[who], who]
            lost.append((f"only {pair[who]}", [code], sorted(_differing(found, whole))))
        raise AssertionError((pair, codes, lost, [one["stderr"] for one in answer]))


_WRONG = "WRONG: "


def _or_wrong(call: Callable[[], str | None]) -> str | None:
    """What a check finds, or how it fails."""
    try:
        return call()
    except AssertionError as error:
        return f"{_WRONG}{error}"


def _differing(found: dict[str, Any], whole: dict[str, Any]) -> set[str]:
    return {name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name)}


def _started(rounds: list[list[Command]]) -> list[Answer]:
    """What became of commands that are processes as a user starts them."""
    answers = []
    for commands in rounds:
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "pretrain", *command["words"]], env=environment(),
                cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )
            for command in commands
        ]  # fmt: skip
        said = [process.communicate()[1] for process in started]
        answers.append(
            [
                {"code": one.returncode, "stderr": text}
                for one, text in zip(started, said, strict=True)
            ]
        )
    return answers


@pytest.fixture(scope="module")
def trials(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials(kit, Places(tmp_path_factory.mktemp("places")))


def test_every_verb_is_named() -> None:
    told = {verb.split(" --")[0].removesuffix(" csv").removesuffix(" md") for verb in VERBS}
    assert told | WRITE_NOTHING | set(PAPER) == all_verbs()


def test_two_at_once(trials: Trials) -> None:
    trials.run(SAMPLE, 2)


@pytest.mark.parametrize("verb", [*PAPER, "paper fig4", "paper fig5"])
def test_a_figure_that_somebody_draws(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    name = {"all": "paper.md"}.get(verb.split()[1], verb.split()[1])
    with held(tmp_path / "out" / name):
        assert run(monkeypatch, *verb.split(), "--out", str(tmp_path / "out")) == 1
        assert_one_line(capfd.readouterr().err, (str(tmp_path / "out" / name), "another process"))
        assert [one.name for one in (tmp_path / "out").iterdir()] == [f".{name}.lock"]


@pytest.mark.long
@pytest.mark.parametrize("verb", [*VERBS, *PAPER])
def test_every_pair_twenty_times(verb: str, trials: Trials) -> None:
    """This verb with itself and all that come after it."""
    trials.run([pair for pair in PAIRS if pair[0] == verb], 20)


@pytest.mark.long
def test_pairs_of_new_interpreters(trials: Trials) -> None:
    """What forks do, processes do as a user starts them."""
    pairs = [("import", "import"), ("data adopt", "data adopt"), ("export", "ranks"),
             ("train", "import"), ("report csv", "report csv")]  # fmt: skip
    trials.run(pairs, 3, real=True)

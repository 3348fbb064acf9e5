"""Two verbs that write one place, started at one moment: every pair of all that write.

Whoever says 0 has its result, whole and as if it had been alone, or as after the other; whoever
does not says why in one line and leaves nothing. Compared are whole folders, file by file.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.foreign import llama_tensors, write_model
from tests.test_adopt import encoded, write_pair
from tests.tokenizer_files import byte_level
from tests.tools import ROOT as REPOSITORY
from tests.tools import TIMED, base_recipe, run, run_processes, write_recipe
from tests.verbs import all_verbs

WRITE_NOTHING = {"plan", "data check", "data info", "doctor"}
"""`doctor` writes a file under a random name and deletes it."""
ALIKE = {
    f"paper {name}": "paper fig4"
    for name in (
        "fig1",
        "fig2",
        "fig3",
        "fig7",
        "table1",
        "fig3-vit",
        "fig6",
        "modern",
        "rank-cost",
        "all",
    )
}
"""Commands of one decorator; those that train hold the folder of their sweep as well."""
VERBS = [
    "train", "evaluate", "export", "import", "ranks", "ranks --figures", "sweep", "report",
    "report csv", "report md", "launch", "demo", "data corpus", "data tokenizer", "data tokenize",
    "data adopt", "paper fig4", "paper fig5",
]  # fmt: skip
PAIRS = list(combinations_with_replacement(VERBS, 2))
SAMPLE = [("data adopt", "data adopt"), ("ranks", "ranks"), ("launch", "launch"), ("demo", "demo")]
VOLATILE = re.compile(
    r"(^|/)(\.lock|run-id|environment\.json|latest|identity\.json)$|/logs/|\.log$|tfevents"
)


@dataclass(frozen=True)
class Kit:
    """What the verbs read: two of each, told apart."""

    runs: list[Path]
    models: list[Path]
    recipes: list[Path]
    sweeps: list[Path]
    texts: list[Path]
    pairs: list[Path]
    tokenizer: Path
    vocabulary: Path
    site: Path
    library: Path

    def words(self, verb: str, which: int, out: Path) -> list[str]:
        """The words of a verb that writes ``out`` from one of two things."""
        own, to = str(self.runs[which]), ["--out", str(out)]
        report = ["report", own, *to]
        return {
            "train": ["train", str(self.recipes[which]), *to],
            "evaluate": ["evaluate", own, "--documents", "3", *to],
            "export": ["export", own, *to],
            "import": ["import", str(self.models[which]), str(self.recipes[which]), *to],
            "ranks": ["ranks", own, *to],
            "ranks --figures": ["ranks", own, "--figures", str(out)],
            "sweep": ["sweep", str(self.sweeps[which]), *to],
            "report": report,
            "report csv": [*report, "--format", "csv"],
            "report md": [*report, "--format", "md"],
            "launch": ["launch", str(self.recipes[which]), "--on", "kubernetes", "--site",
                       str(self.site), *to],
            "demo": ["demo", "--steps", str(10 + which), *to],
            "data corpus": ["data", "corpus", *to],
            "data tokenizer": ["data", "tokenizer", str(self.texts[which]), "--vocab-size",
                               str(300 + which), *to],
            "data tokenize": ["data", "tokenize", str(self.texts[which]), "--tokenizer",
                              str(self.tokenizer), "--workers", "1", *to],
            "data adopt": ["data", "adopt", str(self.pairs[which]), "--tokenizer",
                           str(self.vocabulary), "--split", "80,10,10", *to],
            "paper fig4": ["paper", "fig4", "--model", own, *to],
            "paper fig5": ["paper", "fig5", *to],
        }[verb]  # fmt: skip


@pytest.fixture(scope="module")
def kit(data: Path, corpus: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Kit:
    folder = tmp_path_factory.mktemp("kit")
    models, runs, recipes, sweeps, texts, pairs = [], [], [], [], [], []
    byte_level(folder / "plain.json")
    vocabulary = _gpt2(folder)
    with pytest.MonkeyPatch.context() as patch:
        for which, sign in enumerate((1.0, -1.0)):
            tensors = {name: sign * one for name, one in llama_tensors().items()}
            models.append(write_model(folder / f"model{which}", tensors))
            recipe = base_recipe(data) | {"seed": which}
            recipe["model"] |= {"num_layers": 1}
            recipe["train"] = {"steps": 2, "global_batch": 2}
            recipe["evaluation"] |= {"every": 2, "documents": 2}
            recipe["ranks"] = {"every": 2}
            recipes.append(write_recipe(folder / f"recipe{which}.yaml", recipe))
            runs.append(folder / f"run{which}")
            assert run(patch, "train", str(recipes[-1]), "--out", str(runs[-1])) == 0
            sweep = {"recipe": recipes[-1].name, "seeds": [1],
                     "grid": {"optimizer.weight_decay.attention": [0.0]}}  # fmt: skip
            sweeps.append(write_recipe(folder / f"sweep{which}.yaml", sweep))
            texts.append(_text(folder / f"text{which}.jsonl", which))
            pairs.append(folder / f"pair{which}")
            write_pair(pairs[-1], encoded(vocabulary)[which::2])
    for number in range(110):
        (folder / "library").mkdir(exist_ok=True)
        (folder / f"library/m{number}.py").write_text(f"value = {number}\n" + "# text\n" * 60)
    site = write_recipe(
        folder / "site.yaml", {"container": {"image": "i"}, "processes_per_node": 1}
    )
    return Kit(runs, models, recipes, sweeps, texts, pairs, tokenizer, vocabulary, site,
               folder / "library")  # fmt: skip


def _gpt2(folder: Path) -> Path:
    from tests.test_adopt import EOD, texts, tokenizers

    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(texts(), vocab_size=400, special_tokens=[EOD], show_progress=False)
    made.save_model(str(folder))
    return folder / "vocab.json"


def _text(path: Path, which: int) -> Path:
    rng = random.Random(which)
    words = [f"w{which}{letter}{other}" for letter in "abcdefgh" for other in "ijklmnop"]
    rows = [{"text": " ".join(rng.choices(words, k=40)), "meta": {"pile_set_name": f"S{which}"}}
            for _ in range(150)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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


def answers_of(rounds: list[list[list[str]]], kit: Kit, folder: Path) -> list[list[dict[str, Any]]]:
    request, answer = folder / "rounds.json", folder / "answers.json"
    commands = [[{"words": words} for words in one] for one in rounds]
    request.write_text(
        json.dumps({"rounds": commands, "answer": str(answer), "library": str(kit.library)})
    )
    script = REPOSITORY / "tests/together.py"
    done = run_processes([str(request)], 1, timeout=60 + 10 * len(rounds), script=script)
    assert done.returncode == 0, done.stderr
    return json.loads(answer.read_text())


def trials(pairs: list[tuple[str, str]], count: int, kit: Kit, places: Places) -> list[str]:
    """Each pair together so often; what happened each time: serial, or who was refused."""
    rounds: list[list[list[str]]] = []
    planned: list[tuple[tuple[str, str], list[Path], list[Path]]] = []
    for pair in pairs:
        serial, both = [places.new() for _ in range(4)], [places.new() for _ in range(count)]
        planned.append((pair, serial, both))
        for out, order in zip(serial, ((0,), (1,), (0, 1), (1, 0)), strict=True):
            rounds += [[kit.words(pair[which], which, out)] for which in order]
        rounds += [[kit.words(pair[which], which, out) for which in (0, 1)] for out in both]
    answers = iter(answers_of(rounds, kit, places.folder))
    return [
        told for pair, serial, both in planned for told in _compare(pair, serial, both, answers)
    ]


def _compare(
    pair: tuple[str, str], serial: list[Path], both: list[Path],
    answers: Iterator[list[dict[str, Any]]],
) -> list[str]:  # fmt: skip
    trees = [tree(out) for out in serial]
    one, other, first, second, third, fourth = (next(answers)[0]["code"] for _ in range(6))
    alone = [(one, trees[0]), (other, trees[1])]
    in_order = {
        "first, then second": ([first, second], trees[2]),
        "second, then first": ([fourth, third], trees[3]),
    }
    return [_judge(pair, next(answers), tree(out), out, alone, in_order) for out in both]


def _judge(
    pair: tuple[str, str], answer: list[dict[str, Any]], found: dict[str, Any], out: Path,
    alone: list[tuple[int, dict[str, Any]]], serial: dict[str, tuple[list[int], dict[str, Any]]],
) -> str:  # fmt: skip
    codes = [one["code"] for one in answer]
    said = "\n".join(one["stderr"] for one in answer)
    assert "Traceback" not in said, (pair, said)
    for who in (0, 1):
        wanted, whole = alone[who]
        if codes[who] == wanted and codes[1 - who] in (1, 2) and found == whole:
            errors = [line for line in answer[1 - who]["stderr"].splitlines()
                      if line.startswith("error: ")]  # fmt: skip
            assert len(errors) == 1 and str(out) in errors[0], (pair, errors)
            return f"{pair[1 - who]} refused"
    for name, (both, whole) in serial.items():
        if codes == both and found == whole:
            return name
    lost = {name: sorted(_differing(found, whole)) for name, (_, whole) in serial.items()}
    lost |= {f"only {pair[who]}": sorted(_differing(found, alone[who][1])) for who in (0, 1)}
    raise AssertionError((pair, codes, lost, said))


def _differing(found: dict[str, Any], whole: dict[str, Any]) -> set[str]:
    return {name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name)}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    return Places(tmp_path_factory.mktemp("places"))


def test_every_verb_is_named() -> None:
    told = {verb.split(" --")[0].removesuffix(" csv").removesuffix(" md") for verb in VERBS}
    assert told | WRITE_NOTHING | ALIKE.keys() == all_verbs()


def test_two_at_once(kit: Kit, places: Places) -> None:
    trials(SAMPLE, 1, kit, places)


@pytest.mark.long
@pytest.mark.parametrize("verb", VERBS)
def test_every_pair_twenty_times(verb: str, kit: Kit, places: Places) -> None:
    """This verb with itself and all that come after it."""
    for pair in PAIRS:
        if pair[0] == verb:
            happened = Counter(trials([pair], 20, kit, places))
            print(" + ".join(pair), dict(happened))

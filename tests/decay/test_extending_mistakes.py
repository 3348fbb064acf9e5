"""Wrong policies of a user's own: one line with the recipe, the key and the place in the file."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.config.recipe import dump_config, load_config
from pretrain.training.origin import StartRequest
from pretrain.training.setup import prepare
from pretrain.training.start import _announce
from tests.own_code import (
    COSINE,
    EXAMPLE,
    FILE,
    KEY,
    STABLE,
    WRONG,
    recipe_with,
    write_example,
)
from tests.tools import assert_one_line, pretrain, run, write_recipe

FILES: dict[str, tuple[str, tuple[str, ...]]] = {
    "no such file": ("", ("kind: ", FILE, "No such file")),
    "no such class": (EXAMPLE.replace("LayerCosine", "Cosine"), ("has no LayerCosine", "Cosine")),
    "no policy": (EXAMPLE.replace("(Policy)", ""), ("derived from", "Policy")),
    "no section": (EXAMPLE.replace("(PolicySection)", ""), ("Config", "PolicySection")),
    "no move": (EXAMPLE.replace("def move", "def moves"), ("no method move",)),
    "another signature": (EXAMPLE.replace("decay, step)", "decay)"), ("move(self, site, decay,",)),
    "no Python": (EXAMPLE.replace("def move(", "def move["), (f"{FILE}:", "SyntaxError")),
    "a module that is not there": ("import no_such_module\n", ("only installed", "no_such_module")),
    "a neighbour": ("import sub.stable\n", ("only installed",)),
    "it fails": ("x = 1 / 0\n", (f"{FILE}:1", "ZeroDivisionError")),
    "it leaves": ("raise SystemExit(3)\n", (f"{FILE}:1", "SystemExit")),
    "not text": ("\0", ("cannot be run",)),
    "wants": (EXAMPLE.replace("    class Config", "    wants = 'rank'\n\n    class Config"),
              ("wants is 'rank'", "ranks, weights, norms")),
    "an infinite default": (EXAMPLE.replace("    class Config(PolicySection):\n",
        "    class Config(PolicySection):\n        cap: float = float('inf')\n"),
        ("give its Config back", "cap")),
    "an alias": (EXAMPLE.replace("Field(0.1, ge=0,", "Field(0.1, ge=0, alias='last',"),
                 ("give its Config back", "final")),
    "no figure": (EXAMPLE.replace("    class Config", "    wants = 'weights'\n\n    class Config"),
                  ("no method figure",)),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_wrong(case: str, data: Path, tmp_path: Path) -> None:
    """One line: the recipe, the key, and what is wrong where."""
    text, culprits = FILES[case]
    write_example(tmp_path)
    (tmp_path / FILE).unlink()
    if text:
        assert text != EXAMPLE
        (tmp_path / FILE).write_text(text)
    recipe = write_recipe(tmp_path / "r.yaml", recipe_with(data, COSINE))
    with pytest.raises(ValueError, match=r"policies\[0\]\.kind: ") as error:
        load_config(recipe, code=[])
    assert "\n" not in str(error.value) and type(error.value).__name__ == "UsageError"
    for culprit in (str(recipe), *culprits):
        assert culprit in str(error.value)


ENTRIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "an unknown key": ({"deepst": 1}, ("policies[0].deepst", "did you mean deepest")),
    "a wrong type": ({"deepest": "far"}, ("policies[0].deepest", "'far'")),
    "a bound": ({"final": -1}, ("policies[0].final", "-1")),
    "no roles": ({"roles": []}, ("policies[0].roles",)),
    "roles are missing": (
        {"roles": None},
        ("policies[0].roles: is required, such as [attention]",),
    ),
    "not a number": ({"deepest": True}, ("deepest: must be a number",)),
    "no class": ({"kind": "layer_cosine.py"}, ("not a policy", "FILE.py:CLASS")),
    "no file": ({"kind": "sub:LayerCosine"}, ("not a policy", "rank_target")),
    "a folder": ({"kind": "folder.py:LayerCosine"}, ("folder.py", "cannot be read")),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_an_entry_that_is_wrong(case: str, data: Path, tmp_path: Path) -> None:
    change, culprits = ENTRIES[case]
    write_example(tmp_path)
    (tmp_path / "folder.py").mkdir()
    entry = {key: one for key, one in {**COSINE, **change}.items() if one is not None}
    recipe = write_recipe(tmp_path / "r.yaml", recipe_with(data, entry))
    with pytest.raises(ValueError, match=r"policies\[0\]\.") as error:
        load_config(recipe, code=[])
    assert "\n" not in str(error.value)
    for culprit in culprits:
        assert culprit in str(error.value)


BODIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "NaN": ("return float('nan')", ("query[0]", "update 0", "returns nan")),
    "infinity": ("return decay * float('inf')", ("returns inf",)),
    "a negative λ": ("return -decay", ("returns -", "0 or more")),
    "late": ("return decay if step < 5 else -1.0", ("update 5",)),
    "it leaves": ("raise SystemExit(0)", (":11: SystemExit",)),
    "nothing": ("pass", ("returns None", "not a number")),
    "text": ("return 'much'", ("'much'", "not a number")),
    "true": ("return True", ("True", "not a number")),
    "a tensor": ("import torch; return torch.tensor(decay)", ("tensor", "not a number")),
    "it raises": ("return decay / (1 - site[1])", (":11: ZeroDivisionError", "query[1]")),
    "an unknown name": ("return decay * self.shares", (":11: AttributeError", "shares")),
    "a state that is no JSON": (
        "return decay\n\n    def state(self):\n        return {1: {2}}", ("state", "not JSON")),
    "a state that is no mapping": (
        "return decay\n\n    def state(self):\n        return [1]", ("not a mapping",)),
    "a state by number": (
        "return decay\n\n    def state(self):\n        return {0: 0.5}",
        ("wrong.py:Wrong: state has the key 0,", "str(key)")),
    "a state by number, further in": (
        "return decay\n\n    def state(self):\n        return {'by': [{'x': 1, None: 2}]}",
        ("state has the key None in by[0],",)),
    "a state with a tuple": (
        "return decay\n\n    def state(self):\n        return {'ends': {'of': (1, 2)}}",
        ("state has the tuple (1, 2) in ends.of,", "use a list")),
    "a state that it cannot take up": (
        "return decay\n\n    def state(self):\n        return {}\n\n"
        "    def restore(self, state):\n        state['x']", ("restore fails", "KeyError")),
    "random numbers": (
        "import random; return decay * random.random()", ("asked again", "random numbers")),
    "random numbers later": (
        "import torch; return decay * torch.rand(()).item() if step > 2 else decay",
        ("update 3", "asked again")),
    "a clock": (
        "import time; return decay * (time.perf_counter_ns() % 100_000)", ("asked again", "clock")),
    "a count of calls": (
        "self.n = getattr(self, 'n', 0) + 1; return decay * self.n", ("how often it is asked",)),
    "a rhythm": ("return decay\n\n    every = 0", ("every is 0",)),
    "a form": ("return decay\n\n    form = 'l3'", ("'l3'", "decoupled, l2")),
    "a constructor": (
        "return decay\n\n    def __init__(self, config, setting):\n        raise OSError('no')",
        ("__init__ fails", "OSError")),
    "its own words": (
        "from pretrain.errors import UsageError; raise UsageError('share: not so')",
        ("share: not so",)),
}  # fmt: skip


@pytest.mark.parametrize("case", BODIES)
def test_a_policy_that_is_wrong(case: str, data: Path, tmp_path: Path) -> None:
    """Before anything is trained: one line with the key, the class and the place."""
    body, culprits = BODIES[case]
    (tmp_path / "wrong.py").write_text(WRONG.format(body=body))
    entry = {"kind": "wrong.py:Wrong", "roles": ["query"]}
    recipe = write_recipe(tmp_path / "r.yaml", recipe_with(data, entry))
    with pytest.raises(ValueError, match=r"") as error:
        prepare(load_config(recipe, code=[]), 1)
    assert type(error.value).__name__ == "UsageError" and "\n" not in str(error.value)
    wanted = culprits if case == "its own words" else (KEY, *culprits)
    for culprit in wanted:
        assert culprit in str(error.value)


def test_a_state_that_a_resume_would_lose_ends_at_the_first_observation(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is empty before training, and no checkpoint is written with it."""
    body = (
        "return decay\n\n    wants, seen = 'norms', {}\n\n    def observe(self, measured, step):\n"
        "        self.seen = {step: measured}\n\n    def state(self):\n"
        "        return {'seen': self.seen}"
    )
    (tmp_path / "wrong.py").write_text(WRONG.format(body=body))
    entry = {"kind": "wrong.py:Wrong", "roles": ["query"]}
    recipe = write_recipe(tmp_path / "r.yaml", recipe_with(data, entry))
    out = tmp_path / "run"
    assert run(monkeypatch, "train", str(recipe), "--out", str(out)) == 2
    assert_one_line(capfd.readouterr().err, (KEY, "wrong.py:Wrong", "key 0 in seen"))
    assert '"kind": "train"' not in (out / "metrics.jsonl").read_text()
    assert not list(out.glob("checkpoints/step-*"))


def test_a_mistake_at_the_start_leaves_no_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.py").write_text(WRONG.format(body="return float('nan')"))
    entry = {"kind": "wrong.py:Wrong", "roles": ["query"]}
    recipe = write_recipe(tmp_path / "r.yaml", recipe_with(data, entry))
    for more in ((), ("--dry-run",)):
        out = tmp_path / "run"
        assert run(monkeypatch, "train", str(recipe), "--out", str(out), *more) == 2
        assert_one_line(capfd.readouterr().err, (KEY, "wrong.py:Wrong", "returns nan"))
        assert not out.exists()


@pytest.mark.slow
def test_mistakes_under_way_end_every_process(data: Path, tmp_path: Path) -> None:
    """λ that goes wrong later, a figure that fails on one process, λ that depends on the rank."""
    figure = (
        "return decay\n\n    wants = 'weights'\n\n    def figure(self, info, matrix):\n"
        "        return 1 / (1 - int(os.environ['RANK']))"
    )
    late = "return -1.0 if 3 < step < 5 else decay"
    rank = "return decay * (1 + 1e-9 * int(os.environ['RANK']))"
    cases = {
        "figure": (figure, ("figure of", "wrong.py:", "ZeroDivisionError")),
        "late": (late, ("update 4", "returns -1")),
        "rank": (rank, ("λ as applied differs between ranks 0 and 1", "step 3")),
    }
    for name, (body, culprits) in cases.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "wrong.py").write_text(WRONG.format(body=body))
        entry = {"kind": "wrong.py:Wrong", "roles": ["mlp"]}
        recipe = write_recipe(
            tmp_path / name / "r.yaml",
            recipe_with(data, entry, train={"steps": 9, "global_batch": 8}),
        )
        out = tmp_path / name / "run"
        done = pretrain("train", str(recipe), "--out", str(out), processes=2)
        assert done.returncode in (1, 2), done.stderr[-3000:]
        assert_one_line(done.stderr, culprits)


def test_a_file_is_named_once_in_a_run_folder(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the first start, and at a start with another file: not whenever a run continues."""
    write_example(tmp_path)
    recipe = write_recipe(tmp_path / "r.yaml", recipe_with(data, COSINE, STABLE))
    run = tmp_path / "run"
    run.mkdir()
    grid: Any = SimpleNamespace(describe=lambda: "one process", device=torch.device("cpu"))

    def start() -> list[str]:
        """The files that a start names; then the folder has its recipe."""
        config = load_config(recipe, code=[])
        _announce(prepare(config, 1, None), StartRequest(run, precision=config.precision), grid)
        (run / "config.yaml").write_text(dump_config(config))
        return re.findall(r"runs \S*/(\w+\.py) ", capsys.readouterr().err)

    assert start() == [FILE, "stable.py"]
    assert start() == []
    (tmp_path / FILE).write_text(EXAMPLE + "# changed\n")
    assert start() == [FILE]
    assert start() == []
    (tmp_path / FILE).write_text(EXAMPLE)
    assert start() == [FILE]

"""Random site files: what is rendered is read back as it was meant, or the key is refused."""

from __future__ import annotations

import os
import random
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

import pretrain.__main__
from launchers import batch
from launchers.launch import PLACES
from launchers.site import Site, load_site
from pretrain.errors import UsageError
from tests.recipe_fuzz import keys_of, spoil
from tests.tools import base_recipe, run, write_recipe

pytestmark = pytest.mark.slow

# Lines of `setup` are shell, as the user wrote them.
KEYS = [key for key in keys_of(Site) if "setup" not in key.path]
VERBS = get_command(pretrain.__main__.app)
BASE: dict[str, Any] = {
    "environment": {"PLAIN": "x"}, "container": {"image": "team/image:1"},
    "hosts": {"file": "hosts"}, "slurm": {"partition": "gpu"}, "doctor": False,
}  # fmt: skip
MARKS = ("'", '"', "$(touch hit)", "`touch hit`", ";touch hit;", "$HOME", "\\", "\t", " ", "é🙂",
         "#", "!", "*", "&", "|", "<", ">", "%j", "~", "{a,b}", "=", "--",
         "x" * 2000, "", "\x1b[31m", "\u202e")  # fmt: skip


def odd_value(rng: random.Random) -> str:
    return "".join(rng.choice(MARKS) for _ in range(rng.randint(1, 4)))


def check_prints(
    folder: Path, data: Path, seeds: range, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Counter[int]:  # fmt: skip
    """`launch --print` of random sites: a text that its reader takes, or one line."""
    monkeypatch.chdir(folder)
    recipe = write_recipe(folder / "recipe.yaml", base_recipe(data))
    (folder / "hosts").write_text("one slots=1\n")
    seen: Counter[int] = Counter()
    for seed in seeds:
        rng = random.Random(seed)
        tree, changed = spoil(rng, BASE, KEYS)
        (folder / "site.yaml").write_text(yaml.safe_dump(tree))
        place = rng.choice(PLACES)
        words = ("launch", str(recipe), "--on", place, "--site", "site.yaml", "--print")
        code = run(monkeypatch, *words, command=VERBS)
        output = capsys.readouterr()
        told = (seed, place, changed, output.err[-800:])
        errors = [line for line in output.err.splitlines() if line.startswith("error: ")]
        assert code in (0, 2) and "Traceback" not in output.err, told
        assert len(errors) == (code != 0) and all(len(line) < 1000 for line in errors), told
        seen[code] += 1
        if code == 0 and place == "slurm":
            subprocess.run(["bash", "-n"], input=output.out, text=True, check=True)
        elif code == 0 and place in ("kubernetes", "skypilot"):
            assert isinstance(yaml.safe_load(output.out), dict), told
    return seen


def test_random_sites(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = check_prints(tmp_path, data, range(120), monkeypatch, capsys)
    assert seen[0] > 20 < seen[2]


@pytest.mark.long
def test_random_sites_at_length(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_prints(tmp_path, data, range(1000, 5000), monkeypatch, capsys)


STEP = """#!/bin/bash
cd {folder}
env -0 > environment-seen
printf '%s\\0' "$@" > words-seen
"""


def run_script(folder: Path, site: Site, words: list[str]) -> tuple[list[str], dict[str, str]]:
    """The batch script for real, with a `srun` that records: its words and its variables."""
    work = folder / "run"
    work.mkdir(exist_ok=True)
    variables = folder / "variables"
    variables.write_text(batch.shell_file(site.variables), encoding="utf-8")
    text = batch.render(site, words, work, folder, variables)
    for tool, script in {"srun": STEP.format(folder=folder), "scontrol": "#!/bin/bash\necho n1\n",
                         "getent": "#!/bin/bash\n:\n"}.items():  # fmt: skip
        (folder / tool).write_text(script)
        (folder / tool).chmod(0o755)
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_ID": "5",
        "SLURM_JOB_NUM_NODES": "1",
    }  # fmt: skip
    done = subprocess.run(["bash"], input=text, text=True, env=environment, cwd=folder,
                          capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = (folder / "environment-seen").read_bytes().decode().split("\0")
    return (
        (folder / "words-seen").read_bytes().decode().split("\0")[:-1],
        dict(one.split("=", 1) for one in seen if one),
    )


def check_scripts(folder: Path, seeds: range) -> int:
    """Values of sites reach the job's step as they are; returns how many sites were accepted."""
    accepted = 0
    for seed in seeds:
        rng = random.Random(seed)
        tree = {
            "environment": {f"NAME_{i}": odd_value(rng) for i in range(3)},
            "python": odd_value(rng) or "python3", "doctor": False,
            "container": {"kind": "apptainer", "image": odd_value(rng) or "x",
                          "mounts": [f"/a{odd_value(rng)}:/b"]},
            "slurm": {"partition": odd_value(rng), "account": odd_value(rng),
                      "options": {"comment": odd_value(rng)}},
        }  # fmt: skip
        path = write_recipe(folder / "site.yaml", tree)
        try:
            site = load_site(path, {})
            words = ["train", odd_value(rng), "--out", odd_value(rng)]
            seen, variables = run_script(folder, site, words)
        except UsageError as error:
            assert "\n" not in str(error), (seed, error)
            continue
        accepted += 1
        assert seen[-4:] == words and site.interpreter(True) in seen, (seed, seen)
        assert site.container.image in seen and site.container.mounts[0] in seen, (seed, seen)
        for name, value in site.variables.items():
            assert variables[name] == value, (seed, name, value, variables[name])
        assert not (folder / "hit").exists(), seed
    return accepted


def test_values_reach_the_job(tmp_path: Path) -> None:
    assert check_scripts(tmp_path, range(25)) > 15


@pytest.mark.long
def test_values_reach_the_job_at_length(tmp_path: Path) -> None:
    assert check_scripts(tmp_path, range(1000, 2000)) > 500

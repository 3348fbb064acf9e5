"""A user's own package `models` does no harm, however Python is started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launchers.local import torchrun
from pretrain.config.beside import NAMES
from tests.tools import ROOT

WAYS = ["console script", "python -m", "torchrun -m", "PYTHONPATH"]
CONSOLE = (
    "import sys; from pretrain.__main__ import main; sys.argv[0] = 'pretrain'; sys.exit(main())"
)


def started(command: list[str], folder: Path, path: str = "") -> subprocess.CompletedProcess[str]:
    """A program that starts in a folder, with this repository on the path after ``path``."""
    environment = {key: os.environ[key] for key in os.environ if key != "PYTHONSAFEPATH"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [path, str(ROOT)]))
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(params=["package", "module"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with packages, or modules, of our names that end a process that imports them."""
    for name in NAMES:
        file = tmp_path / f"{name}.py"
        if request.param == "package":
            (tmp_path / name).mkdir()
            file = tmp_path / name / "__init__.py"
        file.write_text("import sys; sys.exit('a package of the user was imported')\n")
    return tmp_path


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[] if way == "python -m" else pytest.mark.long) for way in WAYS]
)
def test_commands_use_our_packages(way: str, folder: Path) -> None:
    start = [sys.executable, "-m", "pretrain"]
    if way == "console script":
        (folder / "bin").mkdir()
        script = folder / "bin/pretrain"
        script.write_text(CONSOLE)
        start = [sys.executable, str(script)]
    if way == "torchrun -m":
        start = [*torchrun(1), "-m", "pretrain"]
    path = str(folder) if way == "PYTHONPATH" else ""
    words = ["data", "tokenize", "nothing", "--tokenizer", "x", "--out", "y"]
    done = started([*start, *words], folder, path)
    assert done.returncode != 0
    assert "nothing: no such file" in done.stderr, done.stderr
    assert "of the user" not in done.stderr


USERS_OWN = {
    "models/__init__.py": "from .net import Net\nSIZE = 3\n",
    "models/net.py": "class Net:\n    pass\n",
    "launchers.py": "START = 'mine'\n",
}
OURS_FIRST = """
import pretrain
from launchers import site
from models import SIZE, Net
from models.net import Net as Same
import launchers, models
assert (SIZE, Net, launchers.START) == (3, Same, 'mine')
assert models.Net is Net and site.Site
from launchers.local import program
from data_pipeline.strict_json import to_json
try:
    models.nothing
except AttributeError as error:
    assert 'nothing' in str(error)
print('both')
"""
THEIRS_FIRST = """
from models import Net, SIZE
import launchers
import pretrain
from launchers import site
from launchers.local import program
from importlib.util import find_spec
import models
assert models.Net is Net and launchers.START == 'mine' and site.Site
assert find_spec('models.roles').origin.startswith(pretrain.__path__[0].removesuffix('pretrain'))
print('both')
"""


@pytest.mark.parametrize("script", [OURS_FIRST, THEIRS_FIRST], ids=["ours first", "theirs first"])
def test_a_script_may_have_packages_of_our_names(script: str, tmp_path: Path) -> None:
    for name, text in USERS_OWN.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "mine.py").write_text(script)
    done = started([sys.executable, "mine.py"], tmp_path)
    assert done.stdout == "both\n", done.stderr


def test_a_module_that_both_have_is_named(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    for name in ("__init__", "roles"):
        (tmp_path / f"models/{name}.py").write_text("")
    (tmp_path / "mine.py").write_text("import models\nimport pretrain\n")
    done = started([sys.executable, "mine.py"], tmp_path)
    assert "hides models.roles of rankdecay" in done.stderr.splitlines()[-1]
    assert "import pretrain before it" in done.stderr

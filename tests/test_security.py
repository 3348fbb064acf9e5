"""SECURITY.md: every claim names a test that there is; and nothing that is read is run."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tools import ROOT

PACKAGES = ("pretrain", "models", "data_pipeline", "launchers")
CLAIMS = re.findall(
    r"^\| (.+?) \| `(tests/[\w/]+\.py)::(\w+)` \|$", (ROOT / "SECURITY.md").read_text(), re.M
)
FORBIDDEN = {
    "eval", "exec", "compile", "os.system", "os.popen",
    "pickle.load", "pickle.loads", "pickle.Unpickler",
    "marshal.load", "marshal.loads", "shelve.open", "dill.load", "dill.loads", "joblib.load",
    "cloudpickle.load", "cloudpickle.loads", "yaml.unsafe_load", "yaml.full_load",
    "yaml.unsafe_load_all", "yaml.full_load_all", "yaml.load_all", "pd.read_pickle",
    "pandas.read_pickle",
    "subprocess.getoutput", "subprocess.getstatusoutput", "zipfile.extractall", "tarfile.open",
}  # fmt: skip


def calls(text: str) -> Iterator[tuple[str, dict[str, str], int]]:
    """Every call: its dotted name, keyword arguments as text, and line."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            words = {one.arg or "**": ast.unparse(one.value) for one in node.keywords}
            yield ast.unparse(node.func), words, node.lineno


def wrong(text: str) -> list[str]:
    """What a module may not do."""
    found = []
    for name, words, line in calls(text):
        bare = name.removeprefix("builtins.")
        if bare in FORBIDDEN:
            found.append(f"{line}: {name}")
        if name.endswith("torch.load") and words.get("weights_only") != "True":
            found.append(f"{line}: {name} without weights_only=True")
        if words.get("allow_pickle", "False") != "False":
            found.append(f"{line}: {name} with pickles")
        if name == "yaml.load" or (name.startswith("yaml.") and "Unsafe" in name):
            found.append(f"{line}: {name}")
        if words.get("shell", "False") != "False":
            found.append(f"{line}: {name} with a shell")
        if words.get("trust_remote_code", "False") != "False":
            found.append(f"{line}: {name} runs code of others")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(one) for one in node.bases}
            found += [f"{node.lineno}: {one}" for one in bases & {"yaml.Loader", "yaml.FullLoader",
                                                                  "yaml.UnsafeLoader"}]  # fmt: skip
    return found


MODULES = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]


def test_the_product_runs_nothing_that_it_reads() -> None:
    assert len(MODULES) > 100
    found = {
        str(file.relative_to(ROOT)): wrong(file.read_text(encoding="utf-8")) for file in MODULES
    }
    # A file of code that the user names is run, in one place (tests/config/test_code_of_others.py).
    runs = found.pop("pretrain/config/extension.py")
    assert sorted(line.partition(": ")[2] for line in runs) == ["compile", "exec"]
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize("line", [
    "torch.load(path)", "torch.load(path, weights_only=False)", "pickle.loads(data)",
    "yaml.load(text, Any)",
    "yaml.unsafe_load(text)", "subprocess.run(words, shell=True)", "eval(text)", "os.system(text)",
    "np.load(path, allow_pickle=True)", "class A(yaml.Loader): pass",
    "exec(text)", "compile(text, name, 'exec')",
    "AutoModel.from_pretrained(name, trust_remote_code=True)",
])  # fmt: skip
def test_the_rule_sees_what_it_forbids(line: str) -> None:
    assert wrong(line)


def test_every_claim_has_a_test() -> None:
    lines = [one for one in (ROOT / "SECURITY.md").read_text().splitlines() if "tests/" in one]
    assert len(CLAIMS) == len(lines) > 10
    for claim, file, name in CLAIMS:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in there, (claim, file, name)


def test_the_page_is_linked() -> None:
    for page in ("README.md", "CONTRIBUTING.md", "docs/launch.md"):
        assert "SECURITY.md" in (ROOT / Path(page)).read_text(encoding="utf-8"), page

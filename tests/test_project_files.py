"""What stands in several files of the project is the same in all of them."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
import yaml

from tests.tools import ROOT

TOML: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT: dict[str, Any] = TOML["project"]
JOBS: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
MAKEFILE = (ROOT / "Makefile").read_text()
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def lower_bound(name: str) -> str:
    """The oldest version of a dependency that is allowed."""
    (bound,) = (
        found[1]
        for line in PROJECT["dependencies"]
        if (found := re.match(rf"{name}>=([0-9.]+),<", line))
    )
    return bound


def test_every_python_that_is_promised_is_tried() -> None:
    words = " ".join(PROJECT["classifiers"])
    promised = re.findall(r"Python :: (3\.\d+)", words)
    assert JOBS["suite"]["strategy"]["matrix"]["python"] == promised
    assert (
        PROJECT["requires-python"]
        == f">={promised[0]}"
        == f">={TOML['tool']['mypy']['python_version']}"
    )
    assert TOML["tool"]["ruff"]["target-version"] == "py" + promised[0].replace(".", "")


def test_the_oldest_torch_is_tried() -> None:
    (command,) = (step["run"] for step in JOBS["oldest-torch"]["steps"] if "run" in step)
    assert command == f"make test-torch TORCH={lower_bound('torch')}.0"
    assert command in (ROOT / "CONTRIBUTING.md").read_text()


def test_continuous_integration_runs_lint_types_and_tests() -> None:
    assert {"run": "bash .ci/run"} in JOBS["suite"]["steps"]
    script = (ROOT / ".ci/run").read_text()
    assert "make lint" in script and "make test" in script
    (lint,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    packages = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
    assert "ruff format --check" in lint and "ruff check" in lint
    assert set(re.search(r"mypy (.*)", lint)[1].split()) == {*packages, "benchmarks"}  # type: ignore[index]


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert [one["name"] for one in citation["authors"]] == [
        one["name"] for one in PROJECT["authors"]
    ]
    assert citation["references"][0]["notes"].removeprefix("arXiv:") in PROJECT["urls"]["Paper"]


def test_every_package_is_typed_and_shipped() -> None:
    shipped = [
        name.rstrip("*") for name in TOML["tool"]["setuptools"]["packages"]["find"]["include"]
    ]
    assert {*shipped, "tests"} == {path.parent.name for path in ROOT.glob("*/__init__.py")}
    for name in shipped:
        assert (ROOT / name / "py.typed").exists()
        assert "py.typed" in TOML["tool"]["setuptools"]["package-data"][name]


def test_make_help_lists_every_target() -> None:
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    listed = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE))
    (phony,) = re.findall(r"^\.PHONY: (.*)", MAKEFILE, re.MULTILINE)
    assert targets == listed == set(phony.split())
    named = [
        *re.findall(r"tests/[\w/]+\.py", MAKEFILE),
        *re.findall(r"benchmarks/\w+\.py", MAKEFILE),
    ]
    (numeric,) = re.findall(r"NUMERIC := \$\(addprefix tests/, ((?:.*\\\n)*.*)\)", MAKEFILE)
    named += [f"tests/{name}" for name in numeric.replace("\\\n", " ").split()]
    assert len(named) > 15 and [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_of_issues_are_forms(path: Any) -> None:
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"] and form["body"]
    ids = [part["id"] for part in form["body"]]
    assert len(ids) == len(set(ids))
    for part in form["body"]:
        assert part["type"] in ("textarea", "dropdown", "input") and part["attributes"]["label"]
        assert part["type"] != "dropdown" or part["attributes"]["options"]

"""Imports go one way: every package imports only from those that stand to its left in `ORDER`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = [
    ["models", "data_pipeline"],
    ["pretrain.errors", "pretrain.spectra"],
    ["pretrain.config.extension"],
    ["pretrain.config.section", "pretrain.config.schedule", "pretrain.config.urls"],
    ["pretrain.config.explain", "pretrain.config.kinds"],
    ["pretrain.decay.sites", "pretrain.decay.policy", "pretrain.decay.guard"],
    ["pretrain.decay.registry"],
    ["pretrain.decay.policies"],
    ["pretrain.runs.service"],
    ["pretrain.runs.services"],
    ["pretrain.tasks.samples"],
    ["pretrain.config"],
    ["pretrain.cli.console"],
    ["pretrain.distributed"],
    ["pretrain.decay"],
    ["pretrain.tasks"],
    ["pretrain.engine"],
    ["pretrain.checkpoint"],
    ["pretrain.ranks"],
    ["pretrain.runs"],
    ["pretrain.training"],
    ["pretrain.sweep"],
    ["launchers"],
    ["pretrain.report"],
    ["pretrain.offline"],
    ["pretrain.cluster"],
    ["pretrain.report.paper"],
    ["pretrain.api"],
    ["pretrain.cli"],
    ["pretrain.__main__"],
    ["pretrain.cli.reference"],
]
PLACE = {name: place for place, names in enumerate(ORDER) for name in names}
PURE = ("pretrain.decay", "pretrain.spectra")
"""What knows neither processes nor DeepSpeed."""
PRODUCT = ("models", "data_pipeline", "launchers", "pretrain")


def sources() -> Iterator[tuple[str, Path]]:
    """Every module of the product by its dotted name."""
    for package in PRODUCT:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


MODULES = dict(sources())


def imported(path: Path) -> set[str]:
    """Dotted names of what a file imports, inside functions and for types too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` imports the module
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def package_of(name: str) -> str:
    """The entry of `ORDER` that holds a module, or an empty text for one of another library."""
    return max(
        (entry for entry in PLACE if f"{name}.".startswith(f"{entry}.")), key=len, default=""
    )


def module_of(name: str) -> str:
    """The module that an imported name is, or lies in; an empty text for other libraries."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


@pytest.mark.parametrize("name", [name for name in MODULES if name != "pretrain"])
def test_imports_go_one_way(name: str) -> None:
    home = package_of(name)
    assert home, f"{name} has no place in ORDER"
    packages = {package_of(module) for module in imported(MODULES[name])} - {"", home}
    wrong = sorted(one for one in packages if PLACE[one] > PLACE[home])
    assert not wrong, f"{name} imports {wrong}, which stand to the right of {home}"


def test_there_is_no_circle() -> None:
    graph = {
        name: {module_of(one) for one in imported(path)} - {"", name}
        for name, path in MODULES.items()
    }
    while graph:
        leaves = {name for name, needs in graph.items() if not needs & graph.keys()}
        assert leaves, f"a circle of imports among {sorted(graph)}"
        for name in leaves:
            del graph[name]


def test_decay_and_spectra_know_no_processes() -> None:
    for name, path in MODULES.items():
        if f"{name}.".startswith(tuple(f"{pure}." for pure in PURE)):
            names = imported(path)
            forbidden = ("torch.distributed", "deepspeed", "megatron", "pretrain.distributed")
            wrong = [
                one for one in names if f"{one}.".startswith(tuple(f"{f}." for f in forbidden))
            ]
            assert not wrong, (name, wrong)


@pytest.mark.parametrize("package", ["pretrain.decay.policies", "pretrain.runs.services"])
def test_what_registers_itself_is_named_by_nobody(package: str) -> None:
    """A new policy or tracker is one file: no other module imports one."""
    members = [name for name in MODULES if name.startswith(f"{package}.")]
    assert len(members) > 1
    for name, path in MODULES.items():
        if not name.startswith(package):
            assert not {module_of(one) for one in imported(path)}.intersection(members), name


def test_only_the_engine_imports_deepspeed() -> None:
    users = {
        package_of(name)
        for name, path in MODULES.items()
        if any(f"{one}.".startswith("deepspeed.") for one in imported(path))
    }
    assert users == {"pretrain.engine"}


def test_no_two_classes_share_a_name() -> None:
    """A word means one thing: a public class is found by its name alone."""
    homes: dict[str, list[str]] = {}
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(name)
    assert not {name: where for name, where in homes.items() if len(where) > 1}


def test_one_look_shows_all_packages() -> None:
    entries = {path.name for path in (ROOT / "pretrain").iterdir()} - {"__pycache__"}
    assert len(entries) <= 20, sorted(entries)


def test_no_file_is_longer_than_a_person_reads() -> None:
    """A file of more than 400 lines is two."""
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert not {name: length for name, length in lengths.items() if length > 400}

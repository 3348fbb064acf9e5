"""A corpus of installed packages: what is read, and that no package is in two splits."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from data_pipeline.corpus import write_corpus
from data_pipeline.installed import LARGEST, installed_files
from data_pipeline.sources import SPLITS
from tests.data_pipeline.test_data import raw_documents, tree
from tests.tools import write_library

PACKAGES = 60


def text_of(name: str) -> str:
    """Text that is this file's alone, and names it."""
    words = random.Random(name).choices(["alpha", "beta", "gamma", "delta"], k=60)
    return f"{name} " + " ".join(words)


def install(site: Path, name: str, files: dict[str, str]) -> None:
    for file, text in files.items():
        path = site / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    info = site / f"{name}-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (info / "RECORD").write_text("".join(f'"{file}",,\n' for file in files))


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    for number in range(PACKAGES):
        name = f"p{number}"
        install(folder, name, {
            f"{name}/a.py": f"'{text_of(name + '-doc')}'\nx = '{text_of(name + '-source')}'",
            f"{name}/README.md": text_of(f"{name}-readme"),
            f"{name}/_vendor/q.py": f"x = '{text_of(name + '-copied')}'",
            f"{name}/tests/t.py": f"x = '{text_of(name + '-tested')}'",
            f"{name}/same.md": text_of("license"),
        })  # fmt: skip
    return folder


def test_a_package_is_in_one_split(site: Path, tmp_path: Path) -> None:
    library = write_library(tmp_path / "library")
    for out in ("a", "b"):
        write_corpus(tmp_path / out, library, installed_files([str(site)]))
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    splits: dict[str, set[str]] = {}
    kinds: list[str] = []
    for split in SPLITS:
        for subset, text in raw_documents(tmp_path / "a", split):
            for name in range(PACKAGES):
                if f"p{name}-" in text:
                    splits.setdefault(f"p{name}", set()).add(split)
            kinds += [
                f"{subset} {kind}"
                for kind in ("doc", "source", "readme", "license", "copied", "tested")
                if f"-{kind} " in text or text.startswith(kind)
            ]
    assert len(splits) == PACKAGES and all(len(one) == 1 for one in splits.values())
    assert {next(iter(one)) for one in splits.values()} == set(SPLITS)
    assert sorted(kinds) == sorted([
        *["Github doc", "Github source", "Python Docstrings doc"] * PACKAGES,
        *["Python Documentation readme"] * PACKAGES, "Python Documentation license",
    ])  # fmt: skip


def test_files_of_packages_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    install(tmp_path, "odd", {
        "odd/large.py": "x" * (LARGEST + 1), "odd/wrong.py": "def", "odd/good.py": "x = 1",
        "odd/data.json": "{}",
    })  # fmt: skip
    record = tmp_path / "odd-1.dist-info/RECORD"
    outside = tmp_path.parent / "outside.py"
    record.write_text(record.read_text() + f"../outside.py,,\nodd/gone.py,,\nodd,,\n{outside},,\n")
    (tmp_path / "later").mkdir()
    install(tmp_path / "later", "Odd", {"odd/shadowed.py": "x = 1"})
    outside.write_text("x = 1")
    for number, bad in enumerate(["\n", "a.py,,,,\n", "a.py,,many\n", "\udcff.py,,\n"]):
        install(tmp_path, f"broken{number}", {f"broken{number}/a.py": "x = 1"})
        (tmp_path / f"broken{number}-1.dist-info/RECORD").write_text(bad, errors="surrogateescape")
    places = [str(tmp_path), str(tmp_path / "later")]
    found = [(name, path.name) for name, path in installed_files(places)]
    assert found == [("odd", "good.py"), ("odd", "wrong.py")]

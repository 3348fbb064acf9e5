"""README and docs: named pages are links, links lead somewhere, named files exist."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from tests.tools import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = {str(page.relative_to(ROOT)): page for page in PAGES}
PACKAGES = ("pretrain", "models", "data_pipeline", "launchers")
FOLDERS = (*PACKAGES, "benchmarks", "configs", "docs", "tests")
NOT_OURS = {"yaml.py", "my_file.py", "layer_cosine.py", "preprocess_data.py"}
"""Modules of a user or of another project that the pages name."""

FENCE = re.compile(r"^(`{3,}).*?^\1`*\s*?$", re.M | re.S)
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(([^()\s]+)\)")
CODE = re.compile(r"(`+)(.+?)\1", re.S)
PAGE = re.compile(r"[\w./-]*\w\.md\b")
PATH = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w./*{{}},-]*")
NAMED = re.compile(r"\b(docs/[\w/-]+\.md)(?:#([\w-]+))?")
MODULE = re.compile(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+")


def prose(text: str) -> str:
    """The page without its blocks of code."""
    return FENCE.sub("", text)


def code_words(text: str) -> list[str]:
    """The words between backticks, outside of blocks, without what ends a sentence."""
    spans = CODE.findall(prose(text))
    return [word.strip("'\"(),;:") for _, span in spans for word in span.split()]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#{1,6} (.+?)\s*#*$", prose(text), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def dead_links(page: Path, text: str) -> list[str]:
    """Links to files or headings that do not exist."""
    dead = []
    for target in LINK.findall(prose(text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        there = file.exists()
        if there and anchor:
            there = anchor in anchors(file.read_text("utf-8") if name else text)
        dead += [] if there else [target]
    return dead


def unlinked_pages(page: Path, text: str) -> list[str]:
    """Names of pages of this repository that stand outside of a link."""
    bare = PAGE.findall(LINK.sub("", prose(text)))
    places = (ROOT, ROOT / "docs", page.parent)
    return [
        name for name in bare
        if name.startswith("docs/") or any((place / name).is_file() for place in places)
    ]  # fmt: skip


def path_exists(word: str) -> bool:
    file, _, name = word.partition("::")
    if name:
        return (ROOT / file).is_file() and f"def {name}(" in (ROOT / file).read_text("utf-8")
    return bool(list(ROOT.glob(word.rstrip("/")))) if "*" in word else (ROOT / word).exists()


def module_exists(word: str) -> bool:
    """Is `word` a module, a package, or a name that a module defines at any depth?"""
    parts = word.split(".")
    for end in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:end])
        file = place.with_suffix(".py")
        if end == len(parts) and (place.is_dir() or file.is_file()):
            return True
        if file.is_file():
            text = file.read_text("utf-8")
            return all(
                re.search(rf"^\s*(?:(?:async )?def |class )?{name}\b", text, re.M)
                for name in parts[end:]
            )
    return False


def missing_files(text: str) -> list[str]:
    """Paths, modules and names of modules that look like this repository's and are not there."""
    missing = []
    for word in code_words(text):
        if PATH.match(word):
            missing += [] if path_exists(word) else [word]
        elif MODULE.fullmatch(word):
            missing += [] if module_exists(word) else [word]
        elif re.fullmatch(r"\w+\.py", word) and word not in NOT_OURS:
            missing += [] if any(any(ROOT.glob(f"{top}/**/{word}")) for top in FOLDERS) else [word]
    for block in FENCE.finditer(text):
        for word in re.findall(r"(?<![\w./-])(?:configs|benchmarks|tests)/[\w./-]+", block[0]):
            missing += [] if (ROOT / word).exists() else [word]
    return missing


@pytest.mark.parametrize("name", NAMES)
def test_every_name_leads_somewhere(name: str) -> None:
    page, text = NAMES[name], NAMES[name].read_text("utf-8")
    assert dead_links(page, text) == []
    assert unlinked_pages(page, text) == []
    assert missing_files(text) == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in reached:
            continue
        reached.add(page)
        targets = (one.partition("#")[0] for one in LINK.findall(prose(page.read_text("utf-8"))))
        todo += [
            (page.parent / one).resolve() for one in targets
            if one.endswith(".md") and ":" not in one
        ]  # fmt: skip
    assert {str(page.relative_to(ROOT)) for page in set(PAGES) - reached} == set()


def listed_pages() -> set[str]:
    """The pages that docs/index.md lists: the navigation of the site (docs/conf.py)."""
    page = ROOT / "docs/index.md"
    targets = re.findall(r"\]\(([\w./-]+\.md)\)", page.read_text("utf-8"))
    return {str((page.parent / one).resolve().relative_to(ROOT)) for one in targets}


def test_the_index_lists_every_page() -> None:
    forms = {name for name in NAMES if name.startswith(".")}
    assert listed_pages() | {"docs/index.md"} == set(NAMES) - forms


@pytest.mark.parametrize("name", NAMES)
def test_a_site_can_be_built_from_the_page(name: str) -> None:
    """What `make docs` would warn about: levels of headings, and links to folders."""
    text = NAMES[name].read_text("utf-8")
    levels = [len(marks) for marks in re.findall(r"^(#{1,6}) ", prose(text), re.M)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    local = [one.partition("#")[0] for one in LINK.findall(prose(text)) if ":" not in one]
    assert [one for one in local if one and (NAMES[name].parent / one).is_dir()] == []


def test_make_docs_stops_at_a_warning() -> None:
    (recipe,) = re.findall(r"^docs:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert "sphinx-build -E -W " in recipe


def test_the_layout_of_the_design_page_names_files_that_exist() -> None:
    layout = FENCE.search((ROOT / "docs" / "design.md").read_text("utf-8"))
    assert layout is not None
    files = re.findall(r"\b\w+\.(?:py|yaml)\b", layout[0])
    folders = re.findall(r"^ *(\w+)/ ", layout[0], re.M)
    assert len(files) > 40 and len(folders) > 10
    for name in (*files, *folders):
        assert any(any(ROOT.glob(f"{top}/**/{name}")) for top in PACKAGES) or name in PACKAGES, name


def test_pages_that_the_code_names_exist() -> None:
    files = [
        one for top in FOLDERS for end in ("py", "yaml") for one in ROOT.glob(f"{top}/**/*.{end}")
    ]
    named = [
        (file, name, anchor)
        for file in files if file != Path(__file__)
        for name, anchor in NAMED.findall(file.read_text("utf-8"))
    ]  # fmt: skip
    assert len(named) > 10
    for file, name, anchor in named:
        assert (ROOT / name).is_file(), (file, name)
        assert not anchor or anchor in anchors((ROOT / name).read_text("utf-8")), (
            file,
            name,
            anchor,
        )


@pytest.mark.parametrize("text, found", [
    ("see `docs/data.md`", "docs/data.md"),
    ("see data.md.", "data.md"),
    ("see [data](docs/no.md)", "docs/no.md"),
    ("see [data](docs/data.md#nothing)", "docs/data.md#nothing"),
    ("see [here](#nothing)", "#nothing"),
    ("![plot](docs/no.png)", "docs/no.png"),
    ("`configs/no.yaml`", "configs/no.yaml"),
    ("`pretrain/no/`", "pretrain/no/"),
    ("`tests/cli/test_cli.py::test_no`", "tests/cli/test_cli.py::test_no"),
    ("`pretrain train configs/no.yaml a=1`", "configs/no.yaml"),
    ("```\npretrain train configs/no.yaml\n```", "configs/no.yaml"),
    ("`pretrain.no`", "pretrain.no"),
    ("`pretrain.spectra.no`", "pretrain.spectra.no"),
    ("`no.py`", "no.py"),
])  # fmt: skip
def test_the_rules_see_what_is_wrong(text: str, found: str) -> None:
    page = ROOT / "README.md"
    assert [*dead_links(page, text), *unlinked_pages(page, text), *missing_files(text)] == [found]


@pytest.mark.parametrize("text", [
    "[`docs/data.md`](docs/data.md), [data](docs/data.md#sources), https://x.org/a.md, `report.md`",
    "`configs/sites/slurm.yaml`, `tests/test_*.py`, `models/`, `models.loss.Projection`, `yaml.py`",
    "```\npretrain ranks models/llama-2-7b docs/none.md\n```",
])  # fmt: skip
def test_the_rules_leave_alone_what_is_right(text: str) -> None:
    page = ROOT / "README.md"
    assert [*dead_links(page, text), *unlinked_pages(page, text), *missing_files(text)] == []


NEVER = r"(?!)"
TERMS = {
    "arm": r"arms?",
    "balance": r"balances?",
    "baseline": r"baselines?",
    "coupling": r"couplings?",
    "discrepancy": r"discrepanc(?:y|ies)",
    "eta": NEVER,  # a letter, on every page
    "exposure": r"exposures?",
    "fork": r"forks?",
    "grid": r"grids?",
    "head-and-group": r"group of \w+ heads",
    "lambda": NEVER,
    "master": r"masters?",
    "micro-batch": r"micro batch(?:es)?",
    "nuclear-bound": r"bounds?",
    "origin": r"origins?",
    "policy": r"polic(?:y|ies)",
    "pseudo-rank": r"pseudo-ranks?",
    "rank": r"process rank",
    "role": r"roles?",
    "site": r"site files?",
    "run-folder": r"run folders?",
    "step-and-update": r"skipped (?:update|step)s?",
    "trunk": r"trunks?",
    "w_qk-and-w_vp": r"W_(?:QK|VP)",
}
"""How the terms of the glossary appear in the prose of other pages."""
GENERATED = {
    "docs/paper.md", "docs/recipe.md", "docs/cli.md", "docs/studies/attention-decay/report.md",
}  # fmt: skip
WRITTEN = {one for one in NAMES if one.startswith("docs/")} - GENERATED - {"docs/glossary.md"}


def used_terms(text: str) -> set[str]:
    """Terms of the glossary in sentences: not in code, headings, images or tables."""
    plain = re.sub(r"^(?:#|\||!\[).*$", "", CODE.sub("", prose(text)), flags=re.M)
    plain = re.sub(r"\]\([^)]*\)", "]", plain)
    return {term for term, pattern in TERMS.items() if re.search(rf"\b{pattern}\b", plain, re.I)}


def test_the_glossary_has_every_term() -> None:
    found = anchors((ROOT / "docs" / "glossary.md").read_text("utf-8"))
    assert found - {"glossary"} == set(TERMS)


@pytest.mark.parametrize("name", sorted({"README.md"} | WRITTEN))
def test_a_page_links_the_terms_that_it_uses(name: str) -> None:
    text = NAMES[name].read_text("utf-8")
    linked = set(re.findall(r"glossary\.md#([\w-]+)", text))
    assert used_terms(text) - linked == set(), f"link the first use to docs/glossary.md, in {name}"

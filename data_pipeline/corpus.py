"""The default data: a corpus in the Pile's format from the Python installation itself.

It has three subsets from the standard library: its sources (``Github``), their docstrings
(``Python Docstrings``) and the language reference in pydoc (``Python Documentation``). All text of
one file is in one split, so that no split contains text of another.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import sysconfig
import tokenize
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from data_pipeline.files import held, refuse_busy, refuse_run, write_aside
from data_pipeline.installed import SOURCES
from data_pipeline.records import is_utf8
from data_pipeline.sources import SPLITS, ChoiceError, DataError

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "config"}
_MIN_CHARACTERS = 200
_PACKAGES_HELD_OUT = 16
"""256ths of all packages: there are few, and one may be large."""
Document = tuple[str, str, str]
"""(split, subset, text)"""


def write_corpus(
    out: Path, library: Path | None = None, packages: Iterable[tuple[str, Path]] = ()
) -> dict[str, int]:
    """Write ``train``, ``val`` and ``test.jsonl.zst`` in the Pile's format.

    The bytes are the same for one Python version (and the same packages), and no network is needed.

    Args:
        library: folder of Python sources; by default this Python's standard library.
        packages: name and path of further files, such as `installed_files`; all of a package are
            in one split.

    Returns:
        Documents per split.

    Raises:
        DataError: if this Python has no readable standard library, or another file is in the way.
    """
    counts = {}
    with held(out):
        refuse_run(out)
        refuse_busy(out)
        documents = _sorted_documents(library or Path(sysconfig.get_paths()["stdlib"]), packages)
        for split in SPLITS:
            own = [(subset, text) for part, subset, text in documents if part == split]
            counts[split] = len(own)
            _write_new(out / f"{split}.jsonl.zst", _packed(own))
    return counts


def _packed(documents: list[tuple[str, str]]) -> bytes:
    """Compressed JSON lines of (subset, text)."""
    import zstandard

    lines = (
        json.dumps({"text": text, "meta": {"pile_set_name": subset}}, ensure_ascii=False) + "\n"
        for subset, text in documents
    )
    data = b"".join(line.encode("utf-8") for line in lines)
    return zstandard.ZstdCompressor(level=9).compress(data)


def _sorted_documents(library: Path, packages: Iterable[tuple[str, Path]]) -> list[Document]:
    found = _once(chain(_documents(library), _of_packages(packages)))
    documents = sorted(found, key=lambda document: _order(document[1], document[2]))
    if len(documents) < 100:
        raise DataError(f"{library}: has too few sources; give your own files to `data tokenize`")
    return documents


def _write_new(path: Path, data: bytes) -> None:
    """Write a file, but do not replace one with other contents."""
    if path.exists() and path.read_bytes() != data:
        raise ChoiceError(
            f"{path}: already exists with other contents; choose another --out or move it"
        )
    write_aside(path, data)


def _once(documents: Iterable[Document]) -> Iterator[Document]:
    """Documents of some length, repeated texts only once."""
    seen: set[bytes] = set()
    for document in documents:
        text = document[2]
        if len(text) >= _MIN_CHARACTERS and is_utf8(text):
            digest = hashlib.sha256(text.encode("utf-8")).digest()
            if digest not in seen:
                seen.add(digest)
                yield document


def _documents(library: Path) -> Iterator[Document]:
    """The documents of the standard library, each file's in one split."""
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if _SKIPPED.intersection(relative.parts[:-1]):
            continue
        if relative.parts[0] == "pydoc_data":
            for text in _topics(_parsed(path)[1]):
                yield _split(text[:80]), "Python Documentation", text
        else:
            yield from _of_source(path, _split(str(relative)))


def _of_packages(files: Iterable[tuple[str, Path]]) -> Iterator[Document]:
    """The documents of packages, each package's in one split."""
    for package, path in files:
        split = _split(f"package {package}", _PACKAGES_HELD_OUT)
        if path.suffix in SOURCES:
            yield from _of_source(path, split)
        else:
            with contextlib.suppress(OSError, UnicodeDecodeError):
                yield split, "Python Documentation", path.read_text(encoding="utf-8")


def _of_source(path: Path, split: str) -> Iterator[Document]:
    source, tree = _parsed(path)
    if source:
        yield split, "Github", source
        for text in _docstrings(tree):
            yield split, "Python Docstrings", text


def _parsed(path: Path) -> tuple[str, ast.Module]:
    """The text of a source and its syntax tree; empty ones if it is no Python."""
    try:
        with tokenize.open(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the code of others
            source = file.read()
            return source, ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError, OSError, RecursionError, MemoryError):
        return "", ast.Module([], [])


def _topics(tree: ast.Module) -> Iterator[str]:
    """The texts of ``pydoc_data.topics``: the values of its one dictionary."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value


def _docstrings(tree: ast.Module) -> Iterator[str]:
    """The docstrings of a module, each class's with those of its methods."""
    module = ast.get_docstring(tree)
    if module:
        yield module
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            parts = [
                f"{part.name}: {text}"
                for part in _statements(node)
                if isinstance(part, ast.ClassDef | ast.FunctionDef)
                and (text := ast.get_docstring(part))
            ]
            if parts:
                yield "\n\n".join(parts)


def _statements(node: ast.stmt) -> Iterator[ast.AST]:
    """A statement and those in it, in the order of `ast.walk`, which also visits expressions."""
    waiting: deque[ast.AST] = deque([node])
    while waiting:
        part = waiting.popleft()
        waiting.extend(
            child
            for child in ast.iter_child_nodes(part)
            if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case)
        )
        yield part


def _split(key: str, share: int = 8) -> str:
    """A split by chance: 256ths of all keys for test, and as many for val."""
    draw = hashlib.sha256(key.encode("utf-8", "replace")).digest()[0]
    return "test" if draw < share else "val" if draw < 2 * share else "train"


def _order(subset: str, text: str) -> bytes:
    return hashlib.sha256(f"{subset}\0{text}".encode()).digest()

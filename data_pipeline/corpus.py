"""The default data: a corpus in the Pile's format from the Python installation itself.

It has three subsets from the standard library: its sources (``Github``), their docstrings
(``Python Docstrings``) and the language reference in pydoc (``Python Documentation``). All text of
one file is in one split, so that no split contains text of another.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
import tokenize
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.files import held, refuse_busy, refuse_run, write_aside
from data_pipeline.records import is_utf8
from data_pipeline.sources import SPLITS, DataError

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "config"}
_MIN_CHARACTERS = 200


def write_corpus(out: Path, library: Path | None = None) -> dict[str, int]:
    """Write ``train``, ``val`` and ``test.jsonl.zst`` in the Pile's format.

    The bytes are the same for one Python version, and no network is needed.

    Args:
        library: folder of Python sources; by default this Python's standard library.

    Returns:
        Documents per split.

    Raises:
        DataError: if this Python has no readable standard library, or another file is in the way.
    """
    import zstandard

    counts = {}
    with held(out):
        refuse_run(out)
        refuse_busy(out)
        documents = _sorted_documents(library or Path(sysconfig.get_paths()["stdlib"]))
        for split in SPLITS:
            lines = [
                json.dumps({"text": text, "meta": {"pile_set_name": subset}}, ensure_ascii=False)
                for part, subset, text in documents
                if part == split
            ]
            counts[split] = len(lines)
            data = "".join(line + "\n" for line in lines).encode("utf-8")
            packed = zstandard.ZstdCompressor(level=9).compress(data)
            _write_new(out / f"{split}.jsonl.zst", packed)
    return counts


def _sorted_documents(library: Path) -> list[tuple[str, str, str]]:
    documents = sorted(_documents(library), key=lambda document: _order(document[1], document[2]))
    if len(documents) < 100:
        raise DataError(f"{library}: has too few sources; give your own files to `data tokenize`")
    return documents


def _write_new(path: Path, data: bytes) -> None:
    """Write a file, but do not replace one with other contents."""
    if path.exists() and path.read_bytes() != data:
        raise DataError(
            f"{path}: already exists with other contents; choose another --out or move it"
        )
    write_aside(path, data)


def _documents(library: Path) -> Iterator[tuple[str, str, str]]:
    """(split, subset, text) of every document; repeated texts only once."""
    seen: set[str] = set()
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if _SKIPPED.intersection(relative.parts[:-1]):
            continue
        try:
            with tokenize.open(path) as file:
                source = file.read()
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, ValueError, OSError):
            continue
        if relative.parts[0] == "pydoc_data":
            candidates = [
                (_split(text[:80]), "Python Documentation", text) for text in _topics(tree)
            ]
        else:
            part = _split(str(relative))
            candidates = [(part, "Github", source)]
            candidates += [(part, "Python Docstrings", text) for text in _docstrings(tree)]
        for part, subset, text in candidates:
            if len(text) >= _MIN_CHARACTERS and text not in seen and is_utf8(text):
                seen.add(text)
                yield part, subset, text


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


def _split(key: str) -> str:
    draw = hashlib.sha256(key.encode("utf-8", "replace")).digest()[0]
    return "test" if draw < 8 else "val" if draw < 16 else "train"


def _order(subset: str, text: str) -> bytes:
    return hashlib.sha256(f"{subset}\0{text}".encode()).digest()

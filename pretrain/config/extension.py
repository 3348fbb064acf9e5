"""The user's own code: a file that a recipe names, or an entry point of an installed package.

This is the only module that runs code outside installed packages. It runs a file if a recipe that
the user gave on the command line names it, or if the command line itself does (``--code``). It
never runs a file because a run folder, a checkpoint, a mirror or an exported model names it: a
recipe that is read from there (`Home` is not a path) finds only code that is already loaded in this
process. The SHA-256 that is recorded is that of the bytes that ran.
"""

from __future__ import annotations

import hashlib
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from data_pipeline.files import read_json, read_small
from pretrain.errors import ENDS, RunError, UsageError

Answer = TypeVar("Answer")

_FILE = re.compile(r"(.*\.py):(\w+)", re.S)
_LARGEST = 1 << 20
"""Largest size of a code file in bytes."""
_LARGEST_MARK = 1 << 20
"""Largest size in bytes of a JSON file that is looked at."""
_WRITTEN: dict[str, tuple[str, ...]] = {
    "run-id": (),
    "metrics.jsonl": (),
    "checkpoints/step-*": (),
    "step-*/manifest.json": (),
    "manifest.json": ("entries", "parameters"),
    "environment.json": ("versions", "grid"),
    "run.json": ("run", "folder"),
    "sweep.json": ("runs", "baseline"),
    "identity.json": ("initial_weights", "data_order"),
}
"""Patterns of files that show that this program wrote a folder: a run, a mirror's copy, a sweep,
checkpoints or tokenised data. Each is enough: a sender may have deleted the others. Other programs
write JSON files of these names too: one that has values, but none of these keys, shows nothing."""


class ExtensionError(ValueError):
    """The user's own code is missing or wrong; one line, without the key."""


@dataclass(frozen=True)
class Code:
    """A code file that is loaded in this process."""

    path: Path
    sha256: str
    data: bytes
    module: ModuleType

    def place_of(self, error: BaseException) -> str:
        """``my_file.py:12: ZeroDivisionError: division by zero``, with the line in this file."""
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(self.path)
        ]
        line = f":{lines[-1]}" if lines else ""
        if isinstance(error, SyntaxError) and error.lineno:
            line = f":{error.lineno}"
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        text = " ".join(reason.split())[:200]
        return f"{self.path.name}{line}: {type(error).__name__}{f': {text}' * bool(text)}"


@dataclass(frozen=True)
class Extension:
    """A user's class, and what identifies it."""

    cls: Any
    kind: str
    """The kind in the run folder: ``my_file.py:LayerCosine``, or the name of an entry point."""
    pin: tuple[str, str]
    """``("sha256", ...)`` of the file, or ``("package", "name version")``."""
    code: Code | None = None


@dataclass(frozen=True)
class Foreign:
    """A recipe is in or below a folder that this program wrote: it may run no code."""

    mark: Path
    """A file that shows it."""


Home = Path | Foreign | None
"""The folder of a recipe's code files; of `Foreign` or None no code may be run that is not loaded
already."""


def ask(
    code: Code | None, action: str, call: Callable[[], Answer], wrong: Callable[[str], UsageError]
) -> Answer:
    """Call a user's code; its exceptions become one line with the place in the user's file.

    Args:
        code: the file; None for a class of an installed package.
        wrong: makes the error of a text.
    """
    try:
        return call()
    except (UsageError, RunError, *ENDS):  # the user's own message, or a signal
        raise
    except BaseException as error:
        place = code.place_of(error) if code else f"{type(error).__name__}: {error}"
        raise wrong(f"{action} fails: {place}") from error


_RUNNING: dict[str, Code] = {}
"""By SHA-256."""
_LOADED: dict[tuple[str, str, str], Extension] = {}
"""Entry points, by group, name and package."""
PINS = ("sha256", "package")
"""Keys that a run folder adds to the entry of a user's class."""


def find(group: str, kind: str, pin: Mapping[str, Any], folder: Home) -> Extension | None:
    """Find the class that a kind in a recipe names.

    Args:
        group: the group of entry points, such as ``rankdecay.policies``.
        pin: the entry of the recipe; one from a run folder has a key of `PINS`.
        folder: the folder of the files.

    Returns:
        None if no code may be run, and the class is not loaded in this process.

    Raises:
        ExtensionError: if the class cannot be found or loaded.
    """
    match = _FILE.fullmatch(kind)
    if match:
        return _in_file(match[1], match[2], str(pin.get("sha256", "")), folder)
    return _in_package(group, kind, str(pin.get("package", "")), folder)


def run_file(path: Path) -> Code:
    """Run a user's file, once in this process.

    Raises:
        ExtensionError: if it cannot be read, or fails.
    """
    try:
        data = read_small(path, _LARGEST)
    except OSError as error:
        raise ExtensionError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ExtensionError(f"{path}: cannot be read ({error})") from None
    digest = hashlib.sha256(data).hexdigest()
    if digest in _RUNNING:
        return _RUNNING[digest]
    name = f"rankdecay_code_{digest[:16]}"
    module = ModuleType(name)
    module.__file__ = str(path)
    code = Code(path, digest, data, module)
    sys.modules[name] = module  # dataclasses and pydantic look names up here
    try:
        exec(compile(data, str(path), "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, ENDS):
            raise
        hint = ""
        if isinstance(error, ModuleNotFoundError):
            hint = "; a code file can import only installed packages"
        raise ExtensionError(f"{path}: cannot be run ({code.place_of(error)}){hint}") from None
    _RUNNING[digest] = code
    return code


def run_code(files: Iterable[Path]) -> None:
    """Run files of code that the command line names.

    Raises:
        UsageError: if one cannot be read, or fails.
    """
    try:
        for file in files:
            run_file(file)
    except ExtensionError as error:
        raise UsageError(f"--code: {error}") from None


def running(sha256: str) -> Code | None:
    """The file with this hash, if it is loaded in this process."""
    return _RUNNING.get(sha256)


def running_files() -> list[Code]:
    """All of the user's files that are loaded in this process."""
    return list(_RUNNING.values())


def names(group: str) -> list[str]:
    """Names of the entry points of a group."""
    return sorted({point.name for point in entry_points(group=group)})


def folder_of(recipe: Path) -> Path | Foreign:
    """The folder of the code files that a recipe names: the recipe's own folder.

    In or below a folder that this program wrote there is none, because files there may come from
    somebody else.
    """
    home = recipe.resolve().parent
    for folder in (home, *home.parents):
        if (mark := _mark(folder)) is not None:
            return Foreign(mark)
    return home


def _mark(folder: Path) -> Path | None:
    """A file that shows that this program wrote a folder."""
    weights = next(folder.glob("*.safetensors*"), None)
    if weights is not None and (folder / "config.json").exists():
        return weights
    for pattern, keys in _WRITTEN.items():
        mark = next(folder.glob(pattern), None)
        if mark is not None and not (keys and _is_of_others(mark, keys)):
            return mark
    return None


def _is_of_others(path: Path, keys: tuple[str, ...]) -> bool:
    """Whether a JSON file has values, but none at these keys."""
    try:
        content = read_json(path, _LARGEST_MARK)
    except (OSError, ValueError):
        return False
    parts = content if isinstance(content, list) else [content]
    if not all(isinstance(part, dict) and part for part in parts):
        return False
    return bool(parts) and not any(key in part for part in parts for key in keys)


def _refused(name: str, folder: Foreign | None) -> ExtensionError:
    shown = f" ({folder.mark} shows it)" if folder else ""
    return ExtensionError(
        f"{name}: a recipe in a folder that this program wrote{shown} cannot run code; name the "
        "file with --code, or copy the recipe elsewhere"
    )


def _in_file(name: str, word: str, pinned: str, folder: Home) -> Extension | None:
    code = _RUNNING.get(pinned)
    if code is None:
        if not isinstance(folder, Path):
            if pinned:
                return None
            raise _refused(name, folder)
        code = run_file(folder / Path(name).expanduser())
        if pinned and code.sha256 != pinned:
            raise ExtensionError(
                f"{code.path} has SHA-256 {code.sha256}, but the recipe needs {pinned}; "
                "restore that file, or remove sha256"
            )
    cls = getattr(code.module, word, None)
    if cls is None:
        classes = [key for key, value in vars(code.module).items() if _is_own(value, code)]
        listed = f"it has {', '.join(classes)}" if classes else "it has no class of its own"
        raise ExtensionError(f"{code.path}: has no {word}; {listed}")
    return Extension(cls, f"{Path(name).name}:{word}", ("sha256", code.sha256), code)


def _is_own(value: Any, code: Code) -> bool:
    return isinstance(value, type) and value.__module__ == code.module.__name__


def _in_package(group: str, kind: str, pinned: str, folder: Home) -> Extension | None:
    if not isinstance(folder, Path):
        return _LOADED.get((group, kind, pinned))
    chosen = next(iter(entry_points(group=group, name=kind)), None)
    if chosen is None:
        return None
    package = _package_of(chosen)
    if pinned and pinned != package:
        raise ExtensionError(f"{kind} belongs to {package} here, but the recipe needs {pinned}")
    key = group, kind, package
    if key not in _LOADED:
        try:
            cls = chosen.load()
        except ENDS:
            raise
        except BaseException as error:
            reason = " ".join(str(error).split())[:200]
            raise ExtensionError(
                f"{kind}: {package} cannot be imported ({type(error).__name__}: {reason})"
            ) from None
        _LOADED[key] = Extension(cls, kind, ("package", package))
    return _LOADED[key]


def _package_of(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value

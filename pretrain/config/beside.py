"""Keeps the packages beside this one apart from a user's packages of the same names.

``models`` is a usual name: a ``models/`` or ``models.py`` in the folder where Python starts, or
beside a script, would be imported instead of ours. So ours are loaded from their own place, and a
user's package stays importable beside them: its modules are found after ours, and names that ours
lacks are looked up in it. Only a module that both have, such as ``models.config``, has one owner.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from itertools import pairwise
from pathlib import Path
from types import ModuleType

NAMES = ("models", "data_pipeline", "launchers")


def bind_packages(root: Path) -> None:
    """Load the packages in ``root`` under their names.

    Raises:
        ImportError: naming a user's module that was imported first and hides one of ours.
    """
    for name in NAMES:
        loaded = sys.modules.get(name)
        if loaded is None:
            _load(name, root / name)
        elif root / name not in [Path(one).resolve() for one in _path_of(loaded)]:
            _join(loaded, name, root / name)


def _is_command() -> bool:
    """Whether Python was started for our command line, which needs nothing of a user's packages."""
    words = sys.orig_argv
    return Path(sys.argv[0]).stem == "pretrain" or any(
        pair[0] == "-m" and pair[1].split(".")[0] in ("pretrain", *NAMES)
        for pair in pairwise(words)
    )


def _path_of(package: ModuleType) -> list[str]:
    return list(getattr(package, "__path__", []))


def _load(name: str, ours: Path) -> None:
    """Load our package, which then finds what a user's package of the same name has."""
    file = ours / "__init__.py"
    spec = spec_from_file_location(name, file, submodule_search_locations=[str(ours)])
    assert spec is not None and spec.loader is not None
    package = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(package)
    if _is_command():
        return
    folders = [(Path(place) / name).resolve() for place in sys.path]
    package.__path__ = list(map(str, dict.fromkeys([ours, *filter(Path.is_dir, folders)])))
    package.__getattr__ = _Users(package, ours).get  # type: ignore[method-assign]


class _Users:
    """A user's package of the same name as ours; it runs when a name of it is asked for."""

    def __init__(self, package: ModuleType, ours: Path) -> None:
        self._package, self._ours = package, ours
        self._has_run = False

    def get(self, wanted: str) -> object:
        """A name that our package lacks."""
        if not wanted.startswith("__") and not self._is_module(wanted):
            self._run()
            if wanted in vars(self._package):
                return vars(self._package)[wanted]
        raise AttributeError(f"module {self._package.__name__!r} has no attribute {wanted!r}")

    def _is_module(self, wanted: str) -> bool:
        """Whether it is a module, which Python asks for as a name before it imports it."""
        return PathFinder.find_spec(wanted, self._package.__path__) is not None

    def _run(self) -> None:
        name = self._package.__name__
        places = [place for place in sys.path if (Path(place) / name).resolve() != self._ours]
        spec = PathFinder.find_spec(name, places)
        if self._has_run or spec is None or spec.loader is None:
            return
        self._has_run = True
        theirs = module_from_spec(spec)
        spec.loader.exec_module(theirs)
        for key, value in vars(theirs).items():
            if not key.startswith("__"):
                vars(self._package).setdefault(key, value)


def _join(theirs: ModuleType, name: str, ours: Path) -> None:
    """Let Python find our modules in a user's package, which was imported before ours.

    Raises:
        ImportError: naming a module that both have.
    """
    folders = [Path(folder) for folder in _path_of(theirs)]
    for file in sorted(ours.glob("*.py")):
        for folder in folders:
            hides = (folder / file.name).exists() or (folder / file.stem).is_dir()
            if file.stem != "__init__" and hides:
                raise ImportError(
                    f"{folder}: hides {name}.{file.stem} of rankdecay, because it was imported "
                    "first; import pretrain before it, or rename one of the two"
                )
    theirs.__path__ = [*map(str, folders), str(ours)]

"""A copy of a run's checkpoints elsewhere: another disk, or an object store, by fsspec."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from pretrain.checkpoint import MANIFEST
from pretrain.errors import RunError, UsageError


class Mirror:
    """Checkpoints at a folder or URL; a checkpoint there is whole once its manifest is."""

    def __init__(self, url: str) -> None:
        """
        Raises:
            UsageError: if the protocol needs a package that is not installed.
        """
        from fsspec.core import url_to_fs

        self.url = url
        try:
            self._system, self._root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UsageError(f"checkpoint.mirror: {url}: {_line(error)}") from None

    def push(self, folder: Path, keep: list[str]) -> None:
        """Copy a checkpoint, its manifest last, then delete those not in ``keep``.

        Raises:
            RunError: naming the URL.
        """
        target = f"{self._root}/{folder.name}"
        try:
            self._system.makedirs(target, exist_ok=True)
            if self._system.exists(f"{target}/{MANIFEST}"):
                self._system.rm_file(f"{target}/{MANIFEST}")
            files = [one.name for one in folder.iterdir() if one.name != MANIFEST]
            for name in [*sorted(files), MANIFEST]:
                self._system.put_file(str(folder / name), f"{target}/{name}")
            for name in self._names():
                if name not in keep:
                    self._system.rm(f"{self._root}/{name}", recursive=True)
        except Exception as error:
            raise RunError(f"{self.url}: {folder.name} not copied ({_line(error)})") from None

    def pull(self, folder: Path) -> str | None:
        """Bring the newest whole checkpoint into ``folder``; its name, or None if there is none.

        Raises:
            RunError: if the mirror cannot be read.
        """
        try:
            manifests = {name: f"{self._root}/{name}/{MANIFEST}" for name in self._names()}
            whole = [name for name, file in manifests.items() if self._system.exists(file)]
            if not whole:
                return None
            name = whole[-1]
            aside = folder / f".{name}.writing"
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            for file in self._system.ls(f"{self._root}/{name}", detail=False):
                self._system.get_file(file, str(aside / file.rpartition("/")[2]))
            os.rename(aside, folder / name)
            return name
        except Exception as error:
            raise RunError(f"{self.url}: cannot be read ({_line(error)})") from None

    def _names(self) -> list[str]:
        if not self._system.exists(self._root):
            return []
        found: list[Any] = self._system.ls(self._root, detail=False)
        names = [str(one).rstrip("/").rpartition("/")[2] for one in found]
        return sorted(name for name in names if name.startswith("step-"))


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

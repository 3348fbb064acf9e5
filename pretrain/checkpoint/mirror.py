"""Copies a run's checkpoints to another disk or an object store, by fsspec.

One mirror can serve any number of runs: each has a folder ``NAME-ID`` there, with the name of its
run folder and the id in its checkpoints. Copies of the first versions are in the mirror's root;
they are read and never deleted.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from data_pipeline.disk import count, open_regular
from data_pipeline.files import write_aside, write_synced
from data_pipeline.strict_json import to_json
from pretrain.checkpoint.manifest import MANIFEST, DamagedError, read_manifest, written_manifest
from pretrain.checkpoint.reader import (
    CHECKPOINTS,
    RUN_ID,
    Checkpoint,
    is_checkpoint_name,
    new_run_id,
    run_id_of,
    step_of,
)
from pretrain.checkpoint.retention import loss_in, superseded
from pretrain.config.run import CheckpointConfig
from pretrain.config.urls import without_secrets
from pretrain.errors import RunError, UsageError, first_line

ABOUT = "run.json"
"""File in a run's folder at the mirror: the run's id, and the run folder that was copied."""
_MARK = ".copied"
"""End of the name of an empty file: the file with the rest of its name was copied."""
_NO_RENAME = (errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of a file system that has no renaming."""
_PART = ".part"
"""End of the name of a file that is being written."""
_WRITING = re.compile(
    rf"(rank-\d{{5}}\.safetensors|{re.escape(MANIFEST)})\.[0-9a-f]{{8}}{re.escape(_PART)}"
)
_OWN = re.compile(
    rf"rank-\d{{5}}\.safetensors(\.[0-9a-f]{{16}}{re.escape(_MARK)})?|{_WRITING.pattern}"
)
_BLOCK = 8 << 20
_REFERENCE = re.compile(r"\$\{(\w+)\}")


def _mark_of(name: str, digest: str) -> str:
    """Name of a file's mark: with its checksum, so that it is of these contents."""
    return f"{name}.{digest[:16]}{_MARK}"


class Mirror:
    """Checkpoints of a run at a folder or URL; a copy is complete when its manifest is there."""

    def __init__(self, url: str, run: Path) -> None:
        """
        Args:
            run: the run folder.

        Raises:
            UsageError: if the protocol needs a package that is not installed, or a variable that
                the URL names is not set.
        """
        from fsspec.core import url_to_fs

        self.url, self._run = without_secrets(url), run
        expanded = self._whole_url(url)
        self._name = re.sub(r"[^A-Za-z0-9._-]", "_", run.resolve().name)[:100]
        try:
            self._system, self._root = url_to_fs(expanded)
        except (ImportError, ValueError) as error:
            raise UsageError(f"checkpoint.mirror: {self.url}: {self._line(error)}") from None

    def _whole_url(self, url: str) -> str:
        """The URL with its environment variables filled in."""
        if "***" in url:
            raise UsageError(
                f"checkpoint.mirror: {url}: its secret was left out when the recipe was written; "
                "write ${NAME} there and set that variable"
            )
        for name in _REFERENCE.findall(url):
            if name not in os.environ:
                raise UsageError(f"checkpoint.mirror: {self.url}: {name} is not set")
        expanded = _REFERENCE.sub(lambda match: os.environ[match[1]], url)
        parts = urlsplit(expanded)
        self._secrets = {os.environ[name] for name in _REFERENCE.findall(url)}
        self._secrets |= {parts.password or "", *dict(parse_qsl(parts.query)).values()} - {""}
        return expanded

    def _line(self, error: Exception) -> str:
        """One line of an error, without secrets."""
        text = without_secrets(first_line(error))
        for secret in sorted(self._secrets, key=len, reverse=True):
            text = text.replace(secret, "***")
        return text

    # --- to the mirror --------------------------------------------------------------------------

    def push(self, folder: Path, settings: CheckpointConfig) -> None:
        """Copy a whole checkpoint, its manifest last, then delete copies that are not kept.

        Raises:
            RunError: naming the URL.
        """
        with self._named(folder):
            digests = Checkpoint(folder).checksums
        self.deliver(folder, digests)
        self.complete(folder, settings)

    def deliver(self, folder: Path, digests: dict[str, str]) -> None:
        """Copy some files of a checkpoint, and mark each one that is there.

        Files that are marked are not copied again, nor those of a complete copy. What is there of
        another checkpoint of that step no longer counts as a copy.

        Args:
            digests: the sha256 of each file; with many processes, a manifest takes long to read.

        Raises:
            RunError: naming the URL.
        """
        with self._named(folder):
            if not run_id_of(self._run):
                raise RunError(f"{self._run / RUN_ID} does not exist")
            target = self._target(folder)
            self._system.makedirs(target, exist_ok=True)
            if self._is_complete(folder):
                return
            present = self._names(target)
            for name, digest in digests.items():
                if _mark_of(name, digest) in present:
                    continue
                for other in present:  # of another file of this name
                    if other.startswith(f"{name}.") and other.endswith(_MARK):
                        self._remove(f"{target}/{other}")
                self._put(folder / name, f"{target}/{name}")
                self._system.pipe_file(f"{target}/{_mark_of(name, digest)}", b"")
            if self._is_complete(folder):  # the main process did not wait for this one
                for name, digest in digests.items():
                    self._remove(f"{target}/{_mark_of(name, digest)}")

    def unmarked(self, folder: Path, digests: dict[str, str]) -> dict[str, str]:
        """The files among some of a checkpoint that nobody has copied yet, with their sha256.

        Raises:
            RunError: naming the URL.
        """
        with self._named(folder):
            if self._is_complete(folder):  # its marks are gone
                return {}
            present = set(self._names(self._target(folder)))
            return {
                name: digest
                for name, digest in digests.items()
                if _mark_of(name, digest) not in present
            }

    def complete(self, folder: Path, settings: CheckpointConfig) -> None:
        """Copy the manifest, then delete marks, and copies that are not kept.

        Only checkpoints of this run are ever deleted, and only in its own folder.

        Raises:
            RunError: naming the URL.
        """
        with self._named(folder):
            place, target = self._place(), self._target(folder)
            about = {"run": run_id_of(self._run), "folder": str(self._run.resolve())}
            self._note(f"{place}/{ABOUT}", to_json(about).encode())
            if not self._is_complete(folder):
                self._put(folder / MANIFEST, f"{target}/{MANIFEST}")
            for name in self._names(target):
                if name.endswith(_MARK) or _WRITING.fullmatch(name):
                    self._remove(f"{target}/{name}")
            for name in self._superseded(place, folder, settings):
                if self._system.exists(f"{place}/{name}/{MANIFEST}"):
                    self._system.rm_file(f"{place}/{name}/{MANIFEST}")
                self._system.rm(f"{place}/{name}", recursive=True)

    def _note(self, path: str, contents: bytes) -> None:
        """Write a small file, unless it has these contents already."""
        with contextlib.suppress(FileNotFoundError):
            if self._system.cat_file(path) == contents:
                return
        self._system.pipe_file(path, contents)

    def _is_complete(self, folder: Path) -> bool:
        """Whether a complete copy of this very checkpoint is there; another one's manifest is
        removed."""
        manifest = f"{self._target(folder)}/{MANIFEST}"
        try:
            found = self._system.cat_file(manifest)
        except FileNotFoundError:  # another process may have removed it just now
            return False
        if found == (folder / MANIFEST).read_bytes():
            return True
        self._remove(manifest)
        return False

    def _remove(self, path: str) -> None:
        """Remove a file, unless another process was faster."""
        with contextlib.suppress(FileNotFoundError):
            self._system.rm_file(path)

    def _place(self) -> str:
        """The run's folder there."""
        return f"{self._root}/{self._name}-{run_id_of(self._run)}"

    def _target(self, folder: Path) -> str:
        return f"{self._place()}/{folder.name}"

    @contextlib.contextmanager
    def _named(self, folder: Path) -> Iterator[None]:
        """Turn any error into one line with the URL and the checkpoint, without secrets."""
        try:
            yield
        except Exception as error:
            raise RunError(f"{self.url}: {folder.name} not copied ({self._line(error)})") from None

    def _put(self, source: Path, target: str) -> None:
        """Copy a file that is whole wherever it has its name: two processes may write the same one.

        An object store shows a file only when it is whole. A local file system renames it then.
        """
        from fsspec.implementations.local import LocalFileSystem

        if not isinstance(self._system, LocalFileSystem):
            self._copy(source, target)
            return
        part = f"{target}.{secrets.token_hex(4)}{_PART}"
        try:
            self._copy(source, part)
            os.replace(part, target)
            return
        except OSError as error:
            if error.errno not in _NO_RENAME:
                raise
        finally:
            with contextlib.suppress(OSError):
                self._remove(part)
        self._copy(source, target)  # as a mounted object store, which shows what is whole

    def _copy(self, source: Path, target: str) -> None:
        """Copy a file block by block, so that a slow mirror can be distinguished from a hang."""
        with open_regular(source) as source_file, self._system.open(target, "wb") as target_file:
            while block := source_file.read(_BLOCK):
                target_file.write(block)
                count(len(block))

    def _superseded(self, place: str, pushed: Path, settings: CheckpointConfig) -> list[str]:
        """Copies that are not kept, those after a step to which the run went back, and parts of
        earlier ones that were never completed."""
        names = [name for _, name in self._whole(place)]
        future = [name for name in names if step_of(Path(name)) > step_of(pushed)]
        past = [Path(name) for name in names if name not in future]
        parts = [
            name for name in self._names(place)
            if is_checkpoint_name(name) and name not in names
            and step_of(Path(name)) < step_of(pushed)
            and all(map(_OWN.fullmatch, self._names(f"{place}/{name}")))
        ]  # fmt: skip

        def loss_of(path: Path) -> float | None:
            return loss_in(self._system.cat_file(f"{place}/{path.name}/{MANIFEST}"))

        return [*future, *parts, *(path.name for path in superseded(past, settings, loss_of))]

    # --- from the mirror ------------------------------------------------------------------------

    def pull(self, misfit: Callable[[Checkpoint], str]) -> list[str]:
        """Fetch the newest complete checkpoint of this run into its folder, if there is one.

        It must have the run's id or, if the run folder was lost, the run's name and recipe.

        Args:
            misfit: says why a checkpoint does not fit this run's recipe; empty if it does.

        Returns:
            One line for each copy that was fetched, is damaged, or has another recipe.

        Raises:
            RunError: if the mirror cannot be read.
        """
        folder, lines = self._run / CHECKPOINTS, list[str]()
        refused: dict[str, str] = {}
        try:
            for place, name in self._candidates():
                if place in refused:
                    continue
                aside = folder / f".{name}.writing"
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
                try:
                    problem = self._fetch(f"{place}/{name}", aside, misfit)
                    if problem.startswith(_MISFIT) and place != self._root:
                        refused[place] = problem
                    if problem:
                        where = f"{place.removeprefix(self._root)}/{name}".strip("/")
                        lines.append(f"{self.url}, {where}: {problem}")
                        continue
                    self._take(place, aside)
                    os.rename(aside, folder / name)
                    return [*lines[:3], f"{name} was fetched from {self.url}"]
                finally:
                    shutil.rmtree(aside, ignore_errors=True)
            return lines[:3]
        except Exception as error:
            raise RunError(f"{self.url}: cannot be read ({self._line(error)})") from None

    def _candidates(self) -> list[tuple[str, str]]:
        """(folder, name) of complete copies: of this run, of its name, of the first versions."""
        run_id = run_id_of(self._run)
        pattern = re.compile(re.escape(self._name) + "-[0-9a-f]{8}")
        named = [name for name in self._names(self._root) if pattern.fullmatch(name)]
        copies: list[tuple[bool, int, str, str]] = []
        for place in named:
            own = bool(run_id) and place == f"{self._name}-{run_id}"
            where = f"{self._root}/{place}"
            copies += [(own, step, where, name) for step, name in self._whole(where)]
        first = [(self._root, name) for _, name in reversed(self._whole(self._root))]
        return [(where, name) for _, _, where, name in sorted(copies, reverse=True)] + first

    def _fetch(self, source: str, aside: Path, misfit: Callable[[Checkpoint], str]) -> str:
        """Fetch a checkpoint, and return why it cannot be used, if so."""
        try:
            self._get(f"{source}/{MANIFEST}", aside / MANIFEST, None)
            checkpoint = Checkpoint(aside)
            different = misfit(checkpoint)
            if different:
                return f"{_MISFIT} ({different}); left alone"
            for file, size in checkpoint.files.items():
                self._get(f"{source}/{file}", aside / file, size)
            return "damaged there, and left alone" if checkpoint.problem() else ""
        except (FileNotFoundError, DamagedError):
            return "damaged there, and left alone"

    def _get(self, source: str, target: Path, size: int | None) -> None:
        """Fetch a file; refuse a pipe, a device or a file of another size."""
        about = self._system.info(source)
        if about["type"] != "file" or size not in (None, about["size"]):
            raise FileNotFoundError(source)
        self._system.get_file(source, str(target))

    def _take(self, place: str, aside: Path) -> None:
        """Make a fetched checkpoint the run's own.

        A run that lost its folder gets its id back; a copy for another folder gets another id, so
        that two runs never write to one place.
        """
        run_id = run_id_of(self._run)
        about: dict[str, Any] = {}
        if self._system.exists(f"{place}/{ABOUT}"):
            about = json.loads(self._system.cat_file(f"{place}/{ABOUT}"))
        if not run_id and about.get("folder") == str(self._run.resolve()):
            run_id = str(about["run"])
        run_id = run_id or new_run_id()
        _, written = read_manifest(aside)
        write_synced(aside / MANIFEST, written_manifest({**written, "run": run_id}))
        write_aside(self._run / RUN_ID, run_id.encode())

    def _whole(self, place: str) -> list[tuple[int, str]]:
        """(step, name) of checkpoints in a folder of the mirror, oldest first."""
        names = [name for name in self._names(place) if is_checkpoint_name(name)]
        names = [name for name in names if self._system.exists(f"{place}/{name}/{MANIFEST}")]
        return sorted((step_of(Path(name)), name) for name in names)

    def _names(self, place: str) -> list[str]:
        self._system.invalidate_cache()
        if not self._system.exists(place):
            return []
        paths: list[Any] = self._system.ls(place, detail=False)
        return [PurePosixPath(str(path).rstrip("/")).name for path in paths]


_MISFIT = "has another recipe"

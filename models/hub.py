"""Models from the Hugging Face Hub: their revisions, and their files on this machine."""

from __future__ import annotations

import fnmatch
import re
import socket
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from models.roles import ModelError

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w.*/-]+)?")
_FILES = (
    "config.json", "generation_config.json", "*.index.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
)  # fmt: skip


def is_hub_name(text: str) -> bool:
    """Whether ``text`` has the form NAME, OWNER/NAME or OWNER/NAME@REVISION."""
    return _NAME.fullmatch(text) is not None


def revisions(name: str, pattern: str) -> list[str]:
    """Branches and tags of a repository that match a pattern with ``*``; else the name itself.

    Raises:
        ModelError: if nothing matches, or the Hub cannot be reached.
    """
    if "*" not in pattern:
        return [pattern]
    api = _api()
    try:
        if _is_off_network():
            raise ConnectionError
        references = api.list_repo_refs(name)
    except Exception as error:
        raise _explained(name, error) from None
    names = [reference.name for reference in [*references.branches, *references.tags]]
    matches = sorted(set(fnmatch.filter(names, pattern)), key=by_number)
    if not matches:
        raise ModelError(f"{name}: no revision matches {pattern}; there are {', '.join(names[:8])}")
    return matches


def by_number(name: str) -> tuple[int, str]:
    digits = re.findall(r"\d+", name)
    return (int(digits[-1]) if digits else -1, name)


def fetch(name: str, revision: str = "") -> Path:
    """The folder of a model's config and weights, from the local cache or the Hub.

    Raises:
        ModelError: one line, if the Hub cannot be reached or has no such model.
    """
    from huggingface_hub import snapshot_download

    api = _api()
    try:
        if _is_off_network():
            raise ConnectionError
        files = api.list_repo_files(name, revision=revision or None)
        kind = "*.safetensors" if any(file.endswith(".safetensors") for file in files) else "*.bin"
        folder = snapshot_download(
            name, revision=revision or None, allow_patterns=[*_FILES, kind], max_workers=2
        )
    except Exception as error:
        cached = _cached(name, revision)
        if cached is None:
            raise _explained(name, error) from None
        return cached
    return Path(folder)


def _cached(name: str, revision: str) -> Path | None:
    """The files of an earlier download, for a machine without a network."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision or None, local_files_only=True))
    except Exception:
        return None


def _api() -> Any:
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ModelError(
            "reading from the Hub needs huggingface_hub: pip install huggingface-hub"
        ) from None
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it would print every retry
    return HfApi()


def _is_off_network() -> bool:
    """Whether the Hub's name cannot be resolved: then retrying for half a minute is useless."""
    from huggingface_hub import constants

    if urllib.request.getproxies():
        return False
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return True
    return False


def _explained(name: str, error: Exception) -> ModelError:
    kind = type(error).__name__
    if kind in ("RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError"):
        return ModelError(f"{name}: not on the Hub, or only after logging in ({kind})")
    return ModelError(
        f"{name}: no such folder here, and the Hub cannot be reached ({kind}); download the model "
        "and give its folder"
    )

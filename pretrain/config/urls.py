"""Removes secrets from URLs."""

from __future__ import annotations

import re

_PASSWORD = re.compile(r"(?<=://)([^/?#:]*):(?!\$\{\w+\}@|[0-9]+/)[^?#]*@")
_QUERY = re.compile(r"([?&][^=&#]*=)(?!\$\{\w+\}(?:[&#]|$))[^&#]+")


def without_secrets(url: str) -> str:
    """A URL without its password and the values of its query, so that it can be shown."""
    return _QUERY.sub(r"\1***", _PASSWORD.sub(r"\1:***@", url))

"""URLs as they may be shown."""

from __future__ import annotations

import re

_PASSWORD = re.compile(r"(?<=://)([^/?#:]*):(?!\$\{\w+\}@|[0-9]+/)[^?#]*@")
_QUERY = re.compile(r"([?&][^=&#]*=)(?!\$\{\w+\}(?:[&#]|$))[^&#]+")


def without_secrets(url: str) -> str:
    """A URL as it may be shown: without its password, and the values of its query."""
    return _QUERY.sub(r"\1***", _PASSWORD.sub(r"\1:***@", url))

"""What a terminal is shown: text as it is, never as markup or as a command to the terminal."""

from __future__ import annotations

import sys
import unicodedata
from typing import Any

_BIDIRECTIONAL = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Signs that make a reader see other text than there is."""


def plain(text: str) -> str:
    """The text with what is no text as visible escapes.

    That is control characters (a terminal obeys them), bytes of a file name that are not UTF-8,
    and signs that turn the direction of reading.
    """
    if text.isprintable():
        return text
    return "".join(_shown(letter) for letter in text)


def _shown(letter: str) -> str:
    is_text = letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cs")
    if is_text and letter not in _BIDIRECTIONAL:
        return letter
    return letter.encode("unicode_escape").decode("ascii")


def on_one_line(text: str) -> str:
    """`plain` text on one line."""
    return plain(" ".join(text.split()))


def console(**settings: Any) -> Any:
    """A rich console that takes text as it is: no markup, no emoji codes, no escapes."""
    from rich.console import Console

    class Plain(Console):
        def render_str(self, text: str, **more: Any) -> Any:
            return super().render_str(plain(text), **more)

    return Plain(markup=False, emoji=False, highlight=False, **settings)


def write_any_text() -> None:
    """Let the standard streams write what their encoding lacks as escapes, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

"""Parses records of sources: finds text and subset, and reports malformed records."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

RECORD_BYTES = 300 << 20
"""The longest record that is read: memory use must not depend on where a line ends."""


class DataError(ValueError):
    """Data that cannot be used; the message names the file and what to do."""


class ChoiceError(DataError):
    """The command or the recipe must change, not the data: for example, --out is taken."""


NO_TEXT = "no text in field"
"""Begins the reason why a record without a text is malformed."""


@dataclass(frozen=True)
class Fields:
    """The fields of a record's text and subset; dots lead into objects."""

    text: str = "text"
    subset: str = "meta.pile_set_name"
    default_subset: str | None = None
    """Subset of records without one; None: such records are malformed."""


@dataclass(frozen=True)
class Document:
    """One text with its split and subset."""

    text: str
    subset: str


@dataclass(frozen=True)
class WholeText:
    """A ``.txt`` file: one document."""

    data: bytes
    subset: str


@dataclass(frozen=True)
class Unreadable:
    """A record that its reader could not extract from the file."""

    reason: str


@dataclass(frozen=True)
class RecordBlock:
    """Consecutive records of one source, not parsed yet."""

    name: str
    first: int
    """Number of the first record, counted from 1 (the line, in line-based files)."""
    records: list[Any]
    """Lines as bytes, rows as mappings, `WholeText`, or `Unreadable`."""


@dataclass
class Parsed:
    """The documents of a block, and the errors of its other records."""

    documents: list[Document] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def parse_block(block: RecordBlock, fields: Fields) -> Parsed:
    """Parse a block; malformed records are reported as ``file:line: reason`` and skipped."""
    parsed = Parsed()
    for number, record in enumerate(block.records, block.first):
        if isinstance(record, bytes) and not record.strip():
            continue
        try:
            parsed.documents.append(_document(record, fields))
        except ValueError as error:
            parsed.problems.append(f"{block.name}:{number}: {error}")
    return parsed


def _document(record: Any, fields: Fields) -> Document:
    if isinstance(record, Unreadable):
        raise ValueError(record.reason)
    if isinstance(record, WholeText):
        text, subset = _utf8(record.data), fields.default_subset or record.subset
    else:
        text, subset = _text_and_subset(record, fields)
    if not text:
        raise ValueError("the text is empty")
    for label, value in (("text", text), ("subset's name", subset)):
        if not is_utf8(value):
            raise ValueError(f"the {label} has a lone surrogate, which is not valid UTF-8")
    return Document(text, subset)


def _text_and_subset(record: Any, fields: Fields) -> tuple[str, str]:
    values = _parse_line(record) if isinstance(record, bytes) else record
    text = _value(values, fields.text)
    if not isinstance(text, str):
        raise ValueError(f"{NO_TEXT} {fields.text!r} (the record has {_shown(values)})")
    subset = _value(values, fields.subset)
    if subset is None or subset == "":
        subset = fields.default_subset
    if not subset and subset != 0:
        raise ValueError(
            f"no subset in field {fields.subset!r} (the record has {_shown(values)}; "
            "--subset-field names the field, --default-subset NAME gives one)"
        )
    return text, _name(subset, fields.subset)


def without_text(text: str, problem: str) -> DataError:
    """The error of sources of which no record can be used: of the options, if they name a field
    that no record has, else of the data.

    Args:
        text: what there is none of.
        problem: the first record's; empty if there is no record.
    """
    names_option = NO_TEXT in problem or "--subset-field" in problem
    kind = ChoiceError if names_option else DataError
    return kind(f"{text}; {first_problem(problem)}" if problem else text)


def first_problem(problem: str) -> str:
    """A malformed record as the reason why no text was found, with the mend for a wrong field."""
    mend = "; name the field with --text-field" if NO_TEXT in problem else ""
    return f"the first problem: {problem}{mend}"


def _shown(values: dict[Any, Any]) -> str:
    return ", ".join(repr(name)[:40] for name in _names(values)[:5]) or "nothing"


def _names(values: dict[Any, Any]) -> list[str]:
    """The fields of a record; those of an object in it as they are asked for, ``meta.body``."""
    return [
        f"{key}.{inner}" if inner is not None else key
        for key, value in values.items()
        for inner in ((value or [None]) if isinstance(value, dict) else [None])
    ]


def _name(subset: Any, path: str) -> str:
    """A subset's name: text or an integer; records without one get the default."""
    if isinstance(subset, str):
        return subset
    if isinstance(subset, int) and not isinstance(subset, bool):
        return str(subset)
    raise ValueError(f"the subset in field {path!r} is not a name ({repr(subset)[:40]})")


# --- JSON -----------------------------------------------------------------------------------

_TWICE = object()
"""The value of a key that occurs twice in an object, with different values."""


def _parse_line(line: bytes) -> dict[str, Any]:
    text = _utf8(line).removeprefix("\ufeff")
    try:
        record = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg})") from None
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if not isinstance(record, dict):
        hint = "; write one object of the array per line" if isinstance(record, list) else ""
        raise ValueError(f"not a JSON object{hint}")
    return record


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        for key, value in pairs:
            if values[key] is not _TWICE and values[key] != value:
                values[key] = _TWICE
    return values


def _whole(digits: str) -> int | float:
    """Parse an integer. Python refuses more than 4,300 digits; such numbers need not be exact."""
    return int(digits) if len(digits) < 100 else float("inf")


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_int=_whole)


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        hint = " (UTF-16? convert it with iconv)" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise ValueError(f"not valid UTF-8 at byte {error.start}{hint}") from None


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8; a lone surrogate cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _value(record: Any, path: str) -> Any:
    """The value at ``meta.pile_set_name``: in nested objects, or under this full name.

    An object may also be a JSON string, bytes of one, or a list of pairs (a parquet map).
    """
    value = record
    if isinstance(record, dict) and path in record:
        value = record[path]
    else:
        for part in path.split("."):
            if value is not _TWICE:
                value = _object(value).get(part)
    if value is _TWICE:
        raise ValueError(f"{path!r} occurs twice in it, with different values")
    if isinstance(value, bytes):
        value = _utf8(value)
    return value


def _object(value: Any) -> dict[Any, Any]:
    if isinstance(value, bytes):
        value = _utf8(value)
    if isinstance(value, str):
        try:
            return _object(_DECODER.decode(value)) if value.lstrip()[:1] == "{" else {}
        except (json.JSONDecodeError, RecursionError):
            return {}
    if isinstance(value, list) and all(isinstance(x, tuple) and len(x) == 2 for x in value):
        return {_utf8(k) if isinstance(k, bytes) else k: v for k, v in value}
    return value if isinstance(value, dict) else {}


# --- splits ---------------------------------------------------------------------------------


SHARES = (98, 1, 1)
"""Percents of train, val and test, if documents are divided and nothing else is said."""


def split_by_document(text: str, shares: tuple[int, int, int] = SHARES) -> str:
    """train, val or test; depends only on the text.

    Args:
        shares: percents of train, val and test.
    """
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, person=b"split").digest()
    draw = int.from_bytes(digest, "little") % 100
    _, val, test = shares
    return "test" if draw < test else "val" if draw < test + val else "train"

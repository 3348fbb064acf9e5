"""Tables for a notebook: pandas' DataFrame where it is installed, else a dictionary of arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

Table = Any
"""A ``pandas.DataFrame``, or ``{column: numpy array}`` without pandas."""


def as_table(rows: Sequence[Mapping[str, Any]], names: Iterable[str] | None = None) -> Table:
    """Rows as a table; a value that a row lacks is NaN, or None in a column of texts.

    Args:
        names: the columns and their order; default: those of the rows, in order of appearance.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row) if names is None else names)
    return from_columns({name: [row.get(name) for row in rows] for name in columns})


def from_columns(columns: Mapping[str, Sequence[Any]]) -> Table:
    """Columns as a table."""
    arrays = {name: _array(values) for name, values in columns.items()}
    if find_spec("pandas") is None:
        return arrays
    import pandas

    return pandas.DataFrame(arrays)


def _array(values: Sequence[Any]) -> Any:
    """Numbers as numbers, with NaN where one is missing; everything else as objects."""
    if all(value is None or isinstance(value, bool | int | float) for value in values):
        if any(value is None for value in values):
            return np.array([np.nan if value is None else float(value) for value in values])
        return np.array(values)
    whole = np.empty(len(values), dtype=object)
    whole[:] = list(values)
    return whole

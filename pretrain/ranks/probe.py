"""Rank statistics during training: rows of one table from the factors of attention heads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor

from models.factors import AttentionShape, Factors
from models.gpt import attention_layers
from models.roles import Role, info_of
from pretrain.config.run import RanksConfig
from pretrain.decay.sites import DecayRecord, DecayRecords, label
from pretrain.engine.engine import Engine
from pretrain.ranks.collect import collect, matrices_of, spans_of
from pretrain.ranks.schema import OF_PAIRS, OF_SIZES
from pretrain.spectra import pair_statistics, product_statistics

Row = dict[str, Any]
Place = tuple[int, int]
"""Layer, and global index of a head or of a key/value head."""
_AT_ONCE = 1 << 28
"""Number of elements of factors that a GPU handles at once: 1 GiB in float32."""
_Any = TypeVar("_Any", bound=Mapping[str, Any])


Part = tuple[list[Place], Factors]
"""Key/value heads, and their factors."""


def measure(engine: Engine, step: int, tokens: int, config: RanksConfig) -> list[Row]:
    """Measure every head of the model; a collective call.

    Returns:
        All rows, sorted, on every process.
    """
    shape, books = engine.config.model.attention_shape, engine.control.books()
    mine: list[Row] = []
    with engine.beside_next_update():
        for places, factors in _collected(engine):
            mine += rows_of(factors, places, shape, books, config)
    for row in mine:
        row.update(step=step, tokens=tokens)
    return in_order([row for part in engine.grid.gather(mine) for row in part])


def copied_factors(engine: Engine) -> list[Part]:
    """The factors that this process measures, in host memory; a collective call.

    A GPU makes the copies before it changes the weights. The host does not wait for them.
    """
    with engine.beside_next_update(wait=False):
        return [(places, factors.on_host()) for places, factors in _collected(engine)]


def in_order(rows: list[Row]) -> list[Row]:
    """Rows by layer, product, level and head."""
    return sorted(rows, key=lambda row: (row["layer"], row["product"], row["level"], row["head"]))


def _collected(engine: Engine) -> Iterator[Part]:
    """The factors of the heads that this process measures: of one layer or, on a GPU, of many
    layers at once, so that the host waits for it only a few times."""
    model, grid = engine.config.model, engine.grid
    fragments = {fragment.info.name: fragment for fragment in engine.fragments()}
    layers = attention_layers(engine.module)
    names = {info_of(p).name for layer in layers for p in matrices_of(layer)}
    spans = spans_of(engine, {name: fragments[name] for name in names if name in fragments})
    limit = _AT_ONCE if grid.device.type == "cuda" else 0
    waiting: list[Part] = []
    for layer in layers:
        units, factors = collect(layer, model, grid, fragments, spans, engine.is_replicated)
        if units:
            waiting.append(([(layer.layer, unit) for unit in units], factors))
        if waiting and (layer is layers[-1] or _numel(waiting) >= limit):
            places = [place for part, _ in waiting for place in part]
            yield places, Factors.joined([factors for _, factors in waiting])
            waiting.clear()


def _numel(waiting: list[Part]) -> int:
    return sum(
        factor.numel()
        for _, factors in waiting
        for factor in (factors.query, factors.key, factors.value, factors.output)
    )


def layer_rows(
    factors: Factors,
    units: list[int],
    layer: int,
    shape: AttentionShape,
    books: DecayRecords | None,
    config: RanksConfig,
) -> list[Row]:
    """Rows of both products for some key/value heads of a layer (`rows_of`).

    Args:
        units: global indices of the key/value heads in ``factors``.
    """
    return rows_of(factors, [(layer, unit) for unit in units], shape, books, config)


def rows_of(
    factors: Factors,
    units: list[Place],
    shape: AttentionShape,
    books: DecayRecords | None,
    config: RanksConfig,
) -> list[Row]:
    """Rows of both products for some key/value heads of any layers.

    Args:
        units: the key/value heads in ``factors``.
        books: λ in use and the decay applied so far, by site label; None: not known.

    Returns:
        One row per query head (``level`` head) and, if heads share keys, one per group, to which
        the balance law applies (docs/statistics.md).
    """
    group = factors.query.shape[1]
    query, output = factors.query.mT, factors.output  # [units, g, width, head]
    key, value = (part.mT.unsqueeze(1).expand_as(query) for part in (factors.key, factors.value))
    heads = [(layer, unit * group + member) for layer, unit in units for member in range(group)]
    rows = _rows("qk", "head", heads, key, query, shape, books, config)
    rows += _rows("vp", "head", heads, output, value, shape, books, config)
    if group > 1:
        shared = factors.key.mT, factors.value.mT
        rows += _rows("qk", "group", units, shared[0], query.flatten(1, 2), shape, books, config)
        rows += _rows("vp", "group", units, output.flatten(1, 2), shared[1], shape, books, config)
    return rows


_FACTOR_ROLES = {
    "qk": (Role.KEY, Role.QUERY),
    "vp": (Role.ATTENTION_OUTPUT, Role.VALUE),
}


def _rows(
    product: str,
    level: str,
    heads: list[Place],
    a: Tensor,
    b: Tensor,
    shape: AttentionShape,
    books: DecayRecords | None,
    config: RanksConfig,
) -> list[Row]:
    a, b = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
    statistics = product_statistics(a, b, config.threshold)
    columns = {name: values.tolist() for name, values in statistics.scalars().items()}
    if config.denominator == "model":
        share = statistics.singular_values.shape[-1] / shape.hidden_size
        columns["pseudo_rank"] = [rank * share for rank in columns["pseudo_rank"]]
    pairs = {name: [float("nan")] * len(heads) for name in OF_PAIRS}
    if product == "qk" and shape.rotary_dim:
        by_pair = pair_statistics(a, b, shape.rotary_dim, config.threshold)
        pairs = {name: getattr(by_pair, name).tolist() for name in OF_PAIRS}
    columns |= pairs
    if product == "qk" and shape.qk_norm:
        columns |= {name: [float("nan")] * len(heads) for name in OF_SIZES}
    if config.spectra:
        columns["singular_values"] = statistics.singular_values.tolist()
    decay = {layer: _decay_of(layer, product, books) for layer in {layer for layer, _ in heads}}
    shared: Row = {"product": product, "level": level}
    return [
        {
            "layer": layer,
            **shared,
            **decay[layer],
            "head": head,
            **{name: values[i] for name, values in columns.items()},
        }
        for i, (layer, head) in enumerate(heads)
    ]


_OF_DECAY = ("decay", "exposure", "retention")


def _decay_of(layer: int, product: str, books: DecayRecords | None) -> Row:
    """The columns about the decay of both factors of a layer's product."""
    row: Row = {}
    any_frozen = any(book.frozen for book in (books or {}).values())
    for side, role in zip("ab", _FACTOR_ROLES[product], strict=True):
        book = books[label((role, layer))] if books else DecayRecord(*[float("nan")] * 3)
        row |= {f"{name}_{side}": getattr(book, name) for name in _OF_DECAY}
        row |= {f"frozen_{side}": book.frozen} if any_frozen else {}
    return row


def lawful(rows: list[_Any]) -> list[_Any]:
    """The rows to which the balance law applies: groups if heads share keys, else heads."""
    return [row for row in rows if row["level"] == "group"] or [
        row for row in rows if row["level"] == "head"
    ]


def by_layer(rows: list[Row]) -> dict[str, float]:
    """Mean pseudo-rank over the heads of every layer, for the log.

    Returns:
        ``qk_layer_00``, ``vp_layer_00`` and so on: names that sort by product, then by layer.
    """
    heads: dict[str, list[float]] = defaultdict(list)
    digits = max(2, len(str(max((row["layer"] for row in rows), default=0))))
    for row in rows:
        if row["level"] == "head":
            heads[f"{row['product']}_layer_{row['layer']:0{digits}}"].append(row["pseudo_rank"])
    return {name: sum(heads[name]) / len(heads[name]) for name in sorted(heads)}


def by_head(rows: list[Row]) -> dict[str, list[list[float]]]:
    """Pseudo-ranks of every head by product: a row for each layer, a column for each head."""
    names = {"qk": "W_QK", "vp": "W_VP"}
    heads = [row for row in rows if row["level"] == "head"]
    layers = sorted({row["layer"] for row in heads})
    width = 1 + max((row["head"] for row in heads), default=-1)
    found = {name: [[float("nan")] * width for _ in layers] for name in names.values()}
    for row in heads:
        found[names[row["product"]]][layers.index(row["layer"])][row["head"]] = row["pseudo_rank"]
    return found


def summary(rows: list[Row]) -> dict[str, float]:
    """Means over all layers, for the log: pseudo-rank of heads, balance of `lawful` rows."""
    means = {}
    for product in ("qk", "vp"):
        chosen = [row for row in rows if row["product"] == product]
        heads = [row for row in chosen if row["level"] == "head"]
        for column, part in (("pseudo_rank", heads), ("balance", lawful(chosen))):
            means[f"{column}_{product}"] = sum(row[column] for row in part) / max(1, len(part))
    return means

"""Rank statistics during training: collects factors from shards and returns rows of one table.

The unit of work is a key/value head with the query heads that share it. Each unit is computed once
in the whole job, on the data-parallel process that already holds most of it. Only the parts of a
unit that ZeRO placed elsewhere are sent, and only to that process.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.config import GPTConfig
from models.factors import AttentionShape, Factors
from models.gpt import attention_layers
from models.layers import Attention
from models.roles import Role, info_of
from pretrain.config.run import RanksConfig
from pretrain.decay.sites import DecayRecord, DecayRecords, label
from pretrain.distributed.grid import Grid
from pretrain.engine.engine import Engine
from pretrain.engine.masters import Fragment, local_shape
from pretrain.ranks.schema import OF_PAIRS, OF_SIZES
from pretrain.spectra import pair_statistics, product_statistics

Row = dict[str, Any]
_Any = TypeVar("_Any", bound=Mapping[str, Any])


def measure(engine: Engine, step: int, tokens: int, config: RanksConfig) -> list[Row]:
    """Measure every head of the model; a collective call.

    Returns:
        All rows, sorted, on every process.
    """
    model, grid = engine.config.model, engine.grid
    shape = model.attention_shape
    mine: list[Row] = []
    books = engine.control.books()
    fragments = {fragment.info.name: fragment for fragment in engine.fragments()}
    layers = attention_layers(engine.module)
    names = {info_of(p).name for layer in layers for p in _matrices(layer)}
    spans = _spans(engine, {name: fragments[name] for name in names if name in fragments})
    for layer in layers:
        units, factors = _collect(layer, model, grid, fragments, spans, engine.is_replicated)
        if units:
            first = grid.tensor_rank * (model.key_value_heads // grid.tensor)
            indices = [first + unit for unit in units]
            mine += layer_rows(factors, indices, layer.layer, shape, books, config)
    for row in mine:
        row.update(step=step, tokens=tokens)
    rows = [row for part in grid.gather(mine) for row in part]
    return sorted(rows, key=lambda row: (row["layer"], row["product"], row["level"], row["head"]))


def _matrices(layer: Attention) -> list[nn.Parameter]:
    return [layer.query, layer.key, layer.value, layer.output]


Spans = dict[str, list[tuple[int, int]]]
"""For each parameter, (offset, length) of the fragment on every data-parallel process."""


def _spans(engine: Engine, fragments: dict[str, Fragment]) -> Spans:
    mine = {name: (part.offset, part.master.numel()) for name, part in fragments.items()}
    parts: list[dict[str, tuple[int, int]]] = [mine]
    if engine.grid.data > 1:
        parts = [{} for _ in range(engine.grid.data)]
        dist.all_gather_object(parts, mine, group=engine.grid.data_group)
    names = {name for part in parts for name in part}
    return {name: [part.get(name, (0, 0)) for part in parts] for name in names}


def _collect(
    layer: Attention,
    model: GPTConfig,
    grid: Grid,
    fragments: dict[str, Fragment],
    spans: Spans,
    replicated: bool,
) -> tuple[list[int], Factors]:
    """The units of ``layer`` that this process computes, and their factors."""
    count = model.key_value_heads // grid.tensor
    pieces = [_piece_indices(layer, unit, count) for unit in range(count)]
    owners = _owners(layer, pieces, spans, grid, replicated)
    mine = [unit for unit in range(count) if owners[unit] == grid.data_rank]
    inbox: dict[tuple[int, int, int], Tensor] = {}
    if not replicated and grid.data > 1:
        inbox = _exchange(layer, pieces, owners, fragments, spans, grid)
    assembled: list[list[Tensor]] = []
    for unit in mine:
        parts = []
        for matrix, parameter in enumerate(_matrices(layer)):
            indices = pieces[unit][matrix]
            values = torch.zeros(len(indices), device=grid.device)
            name = info_of(parameter).name
            for rank in range(1 if replicated else grid.data):
                is_local = replicated or rank == grid.data_rank
                low, high = _range(indices, spans[name][grid.data_rank if is_local else rank])
                if high > low:
                    values[low:high] = (
                        _select(fragments[name], indices[low:high])
                        if is_local
                        else inbox[rank, unit, matrix]
                    )
            parts.append(values)
        assembled.append(parts)
    group = model.num_attention_heads // model.key_value_heads
    return mine, _shaped(assembled, model.head_size, model.hidden_size, group)


def _piece_indices(layer: Attention, unit: int, count: int) -> list[Tensor]:
    """Ascending flat indices, in each local matrix, of the elements of ``unit``."""
    indices = []
    for parameter in _matrices(layer):
        rows, columns = local_shape(parameter)
        if parameter is layer.output:
            width = columns // count
            part = torch.arange(unit * width, (unit + 1) * width)
            indices.append((torch.arange(rows)[:, None] * columns + part).flatten())
        else:
            height = rows // count
            indices.append(torch.arange(unit * height * columns, (unit + 1) * height * columns))
    return indices


def _range(indices: Tensor, span: tuple[int, int]) -> tuple[int, int]:
    """The slice of ascending ``indices`` inside a span (offset, length)."""
    bounds = torch.tensor([span[0], span[0] + span[1]])
    low, high = torch.searchsorted(indices, bounds).tolist()
    return low, high


def _select(fragment: Fragment, indices: Tensor) -> Tensor:
    return fragment.master[(indices - fragment.offset).to(fragment.master.device)].float()


def _owners(
    layer: Attention, pieces: list[list[Tensor]], spans: Spans, grid: Grid, replicated: bool
) -> list[int]:
    """The data-parallel process that computes each unit: the one that holds most of it."""
    if replicated or grid.data == 1:
        return [(layer.layer * len(pieces) + unit) % grid.data for unit in range(len(pieces))]
    owners = []
    for unit in pieces:
        sizes = [0] * grid.data
        for parameter, indices in zip(_matrices(layer), unit, strict=True):
            for rank, span in enumerate(spans[info_of(parameter).name]):
                low, high = _range(indices, span)
                sizes[rank] += high - low
        owners.append(sizes.index(max(sizes)))
    return owners


def _exchange(
    layer: Attention,
    pieces: list[list[Tensor]],
    owners: list[int],
    fragments: dict[str, Fragment],
    spans: Spans,
    grid: Grid,
) -> dict[tuple[int, int, int], Tensor]:
    """Send parts that others compute and receive parts that this process computes.

    Parts are keyed (source, unit, matrix).
    """
    me = grid.data_rank
    outgoing: dict[int, list[Tensor]] = defaultdict(list)
    incoming: dict[int, list[tuple[tuple[int, int, int], int]]] = defaultdict(list)
    for unit, owner in enumerate(owners):
        for matrix, parameter in enumerate(_matrices(layer)):
            indices, name = pieces[unit][matrix], info_of(parameter).name
            if owner != me:
                low, high = _range(indices, spans[name][me])
                if high > low:
                    outgoing[owner].append(_select(fragments[name], indices[low:high]))
                continue
            for source, span in enumerate(spans[name]):
                low, high = _range(indices, span)
                if source != me and high > low:
                    incoming[source].append(((source, unit, matrix), high - low))
    peer = {rank: _peer(grid, rank) for rank in range(grid.data)}
    buffers = {
        source: torch.empty(sum(size for _, size in wanted), device=grid.device)
        for source, wanted in incoming.items()
    }
    operations = [
        dist.P2POp(dist.isend, torch.cat(parts), peer[rank], group=grid.data_group)
        for rank, parts in sorted(outgoing.items())
    ] + [
        dist.P2POp(dist.irecv, buffer, peer[rank], group=grid.data_group)
        for rank, buffer in sorted(buffers.items())
    ]
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()
    inbox = {}
    for source, wanted in incoming.items():
        sizes = [size for _, size in wanted]
        for (key, _), values in zip(wanted, buffers[source].split(sizes), strict=True):
            inbox[key] = values
    return inbox


def _peer(grid: Grid, data_rank: int) -> int:
    return grid.global_rank(pipeline=grid.pipeline_rank, data=data_rank, tensor=grid.tensor_rank)


def _shaped(assembled: list[list[Tensor]], head: int, width: int, group: int) -> Factors:
    if not assembled:
        empty = torch.empty(0)
        return Factors(empty, empty, empty, empty)
    query, key, value, output = (torch.stack(parts) for parts in zip(*assembled, strict=True))
    return Factors(
        query=query.view(-1, group, head, width),
        key=key.view(-1, head, width),
        value=value.view(-1, head, width),
        output=output.view(-1, width, group, head).permute(0, 2, 1, 3),
    )


def layer_rows(
    factors: Factors,
    units: list[int],
    layer: int,
    shape: AttentionShape,
    books: DecayRecords | None,
    config: RanksConfig,
) -> list[Row]:
    """Rows of both products for some key/value heads of a layer.

    Args:
        units: global indices of the key/value heads in ``factors``.
        books: λ in use and the decay applied so far, by site label; None: not known.

    Returns:
        One row per query head (``level`` head) and, if heads share keys, one per group, to which
        the balance law applies (docs/statistics.md).
    """
    group = factors.query.shape[1]
    query, output = factors.query.mT, factors.output  # [units, g, width, head]
    key, value = (part.mT.unsqueeze(1).expand_as(query) for part in (factors.key, factors.value))
    heads = [unit * group + member for unit in units for member in range(group)]
    rows = _rows("qk", "head", heads, key, query, layer, shape, books, config)
    rows += _rows("vp", "head", heads, output, value, layer, shape, books, config)
    if group > 1:
        shared = factors.key.mT, factors.value.mT
        rows += _rows(
            "qk", "group", units, shared[0], query.flatten(1, 2), layer, shape, books, config
        )
        rows += _rows(
            "vp", "group", units, output.flatten(1, 2), shared[1], layer, shape, books, config
        )
    return rows


_FACTOR_ROLES = {
    "qk": (Role.KEY, Role.QUERY),
    "vp": (Role.ATTENTION_OUTPUT, Role.VALUE),
}


def _rows(
    product: str,
    level: str,
    heads: list[int],
    a: Tensor,
    b: Tensor,
    layer: int,
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
    shared: Row = {"layer": layer, "product": product, "level": level}
    for side, role in zip("ab", _FACTOR_ROLES[product], strict=True):
        book = books[label((role, layer))] if books else DecayRecord(*[float("nan")] * 3)
        shared |= {
            f"{field.name}_{side}": getattr(book, field.name) for field in fields(DecayRecord)
        }
    return [
        {**shared, "head": head, **{name: values[i] for name, values in columns.items()}}
        for i, head in enumerate(heads)
    ]


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

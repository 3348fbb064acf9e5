"""Collects the factors of attention heads from fp32 masters that ZeRO may have divided.

The unit of work is a key/value head with the query heads that share it. Each unit is computed once
in the whole job, on the data-parallel process that already holds most of it. Only the parts of a
unit that ZeRO placed elsewhere are sent, and only to that process.
"""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.config import GPTConfig
from models.factors import Factors
from models.layers import Attention, shares_keys
from models.roles import info_of
from pretrain.distributed.grid import Grid
from pretrain.engine.engine import Engine
from pretrain.engine.masters import Fragment, local_shape
from pretrain.engine.shards import local_shard, whole_tensor


def matrices_of(layer: Attention) -> list[nn.Parameter]:
    """The four matrices whose heads are measured."""
    return [layer.query, layer.key, layer.value, layer.output]


Spans = dict[str, list[tuple[int, int]]]
"""For each parameter, (offset, length) of the fragment on every data-parallel process."""


def spans_of(engine: Engine, fragments: dict[str, Fragment]) -> Spans:
    """The spans of fragments on every data-parallel process; a collective call the first time.

    They never change. An exchange of objects would make the host wait for a GPU.
    """
    if engine.spans:
        return engine.spans
    mine = {name: (part.offset, part.master.numel()) for name, part in fragments.items()}
    parts: list[dict[str, tuple[int, int]]] = [mine]
    if engine.grid.data > 1:
        parts = [{} for _ in range(engine.grid.data)]
        dist.all_gather_object(parts, mine, group=engine.grid.data_group)
    names = {name for part in parts for name in part}
    engine.spans = {name: [part.get(name, (0, 0)) for part in parts] for name in names}
    return engine.spans


def collect(
    layer: Attention,
    model: GPTConfig,
    grid: Grid,
    fragments: dict[str, Fragment],
    spans: Spans,
    replicated: bool,
) -> tuple[list[int], Factors]:
    """The units of ``layer`` that this process computes, by their global indices, and their
    factors."""
    group = model.num_attention_heads // model.key_value_heads
    if shares_keys(model, grid.tensor):
        return _of_shared_keys(layer, model.key_value_heads, group, grid, fragments, replicated)
    count = model.key_value_heads // grid.tensor
    first = grid.tensor_rank * count
    if grid.data == 1 or replicated:
        mine = _whole_units(layer, count, grid, replicated)
        matrices = [_whole(parameter, fragments) for parameter in matrices_of(layer)]
        return [first + unit for unit in mine], _cut(matrices, mine, count, group)
    pieces = [_piece_indices(layer, unit, count) for unit in range(count)]
    owners = _owners(layer, pieces, spans, grid)
    mine = [unit for unit in range(count) if owners[unit] == grid.data_rank]
    inbox = _exchange(layer, pieces, owners, fragments, spans, grid)
    assembled: list[list[Tensor]] = []
    for unit in mine:
        parts = []
        for matrix, parameter in enumerate(matrices_of(layer)):
            indices = pieces[unit][matrix]
            values = torch.zeros(len(indices), device=grid.device)
            name = info_of(parameter).name
            for rank in range(grid.data):
                low, high = _range(indices, spans[name][rank])
                if high > low:
                    values[low:high] = (
                        _select(fragments[name], indices[low:high])
                        if rank == grid.data_rank
                        else inbox[rank, unit, matrix]
                    )
            parts.append(values)
        assembled.append(parts)
    units = [first + unit for unit in mine]
    return units, _shaped(assembled, model.head_size, model.hidden_size, group)


def _of_shared_keys(
    layer: Attention,
    count: int,
    group: int,
    grid: Grid,
    fragments: dict[str, Fragment],
    replicated: bool,
) -> tuple[list[int], Factors]:
    """The same if several tensor-parallel processes share a key/value head, and divide its queries:
    each process of the stage gets the whole matrices, and computes other units."""
    matrices = []
    for parameter in matrices_of(layer):
        fragment = fragments.get(info_of(parameter).name)
        parts = [(fragment.offset, fragment.master)] if fragment is not None else []
        flat = local_shard(parameter, parts, grid, replicated)
        matrices.append(whole_tensor(parameter, flat, grid))
    ranks = grid.tensor * grid.data
    me = grid.data_rank * grid.tensor + grid.tensor_rank
    mine = [unit for unit in range(count) if (layer.layer * count + unit) % ranks == me]
    return mine, _cut(matrices, mine, count, group)


def _whole_units(layer: Attention, count: int, grid: Grid, replicated: bool) -> list[int]:
    """Units that this process computes if it holds all: replicas divide them."""
    if not replicated:
        return list(range(count))
    return [
        unit for unit in range(count) if (layer.layer * count + unit) % grid.data == grid.data_rank
    ]


def _whole(parameter: nn.Parameter, fragments: dict[str, Fragment]) -> Tensor:
    """The whole local matrix of masters, without a copy."""
    return fragments[info_of(parameter).name].master.view(local_shape(parameter))


def _cut(matrices: list[Tensor], units: list[int], count: int, group: int) -> Factors:
    """Some of ``count`` units of whole matrices; all of them are views.

    A GPU is busy with the next update: each operation here would wait for a part of it.
    """
    query, key, value, output = matrices
    width = query.shape[1]
    chosen = slice(None) if len(units) == count else units
    return Factors(
        query=query.view(count, group, -1, width)[chosen].float(),
        key=key.view(count, -1, width)[chosen].float(),
        value=value.view(count, -1, width)[chosen].float(),
        output=output.view(width, count, group, -1).permute(1, 2, 0, 3)[chosen].float(),
    )


def _piece_indices(layer: Attention, unit: int, count: int) -> list[Tensor]:
    """Ascending flat indices, in each local matrix, of the elements of ``unit``."""
    indices = []
    for parameter in matrices_of(layer):
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


def _owners(layer: Attention, pieces: list[list[Tensor]], spans: Spans, grid: Grid) -> list[int]:
    """The data-parallel process that computes each unit: the one that holds most of it."""
    owners = []
    for unit in pieces:
        sizes = [0] * grid.data
        for parameter, indices in zip(matrices_of(layer), unit, strict=True):
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
        for matrix, parameter in enumerate(matrices_of(layer)):
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

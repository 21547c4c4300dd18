"""The edges between nodes whose two sides carry other channels: gathers, sums, zeros put back, and
movements that become one selection.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx

from demp_fx.calls import SIZES, called
from demp_fx.channels.constraints import Edge
from demp_fx.channels.labels import varying
from demp_fx.channels.network import CATS
from demp_fx.passes.folds import indices
from demp_fx.passes.plan import Gather, PruningPlan, Selection, Spread, Sum
from demp_fx.passes.widths import Widths, along


def put_edges(plan: PruningPlan, widths: Widths) -> None:
    """Turn every edge with different channels on its two sides into a gather or a sum."""
    kept = widths.solution.kept
    into: dict[str, list[Edge]] = defaultdict(list)
    wanted: dict[tuple[str, str, int], Tensor] = {}
    dropped = {node.name for node in widths.dropped}
    for edge in widths.walk.system.edges:
        if edge.consumer in dropped:
            continue
        want = kept(edge.target)
        into[edge.consumer].append(edge)
        wanted[edge.producer, edge.consumer, edge.dim] = (
            want & kept(edge.source) if edge.kind != "gather" else want
        )
    layouts: dict[tuple[str, int], Tensor] = {}
    for node in widths.walk.graph.graph.nodes:
        edges = into.get(node.name)
        if edges is None:
            continue
        for edge in edges:
            layouts.setdefault((edge.producer, edge.dim), kept(edge.source))
        _join(plan, node, widths, edges, layouts, wanted)
        for edge in edges:
            if edge.kind == "spread":
                plan.spreads += _spread(node, widths, edge)
        operands = [e for e in edges if e.kind == "sum"]
        if len(operands) == 2:
            plan.sums += _sum(node, widths, operands)
    plan.selections = _selections(widths, layouts)
    for (producer, consumer, dim), want in wanted.items():
        layout = layouts[producer, dim]
        if not torch.equal(layout, want):
            index = indices(want[layout])
            plan.gathers.append(Gather(producer=producer, consumer=consumer, dim=dim, index=index))


def _join(
    plan: PruningPlan, node: fx.Node, widths: Widths, edges: list[Edge],
    layouts: dict[tuple[str, int], Tensor], wanted: dict[tuple[str, str, int], Tensor],
) -> None:  # fmt: skip
    """Gathers in front of a concat become one behind it; not where what it has made is then
    written into while others read it, as that would go to a copy."""
    if node.target not in CATS or len(node.args) == 0:
        return
    env, made = widths.walk.env, widths.walk.env[node]
    if len(node.users) > 1 and widths.walk.version(made):
        return
    pieces: Any = node.args[0]
    rank = made.dim()
    dim = (node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)) % rank
    keys = [(e.producer, node.name, dim) for e in edges if e.dim == dim]
    cut = [k for k in keys if not torch.equal(wanted[k], layouts[k[0], dim])]
    if len(cut) < 2:
        return
    parts = [layouts.get((p.name, dim), along(widths.masks(p), env[p], dim)) for p in pieces]
    layout = layouts[node.name, dim] = torch.cat(parts)
    plan.nodes[node.name] = {**plan.nodes.get(node.name, {}), dim: int(layout.sum())}
    for key in keys:
        wanted[key] = layouts[key[0], dim]
    own = along(widths.masks(node), made, dim)
    for user in node.users:
        if called(user) not in SIZES and user not in widths.dropped:
            wanted.setdefault((node.name, user.name, dim), own)


def _selections(widths: Widths, layouts: dict[tuple[str, int], Tensor]) -> list[Selection]:
    """Movements that no longer fit what they move, as one selection each."""
    found, walk = [], widths.walk
    for node, end in walk.chains.selections.items():
        if node not in widths.dropped:
            continue
        labels = walk.value(walk.env[node]).labels
        label = next((x for x in labels if varying(x) == (end.dim,)), None)
        kept = torch.ones_like(end.index, dtype=torch.bool)  # of one that is taken alone
        if label is not None:
            kept = widths.solution.kept(label.reshape(-1))
        # by its labels, though it may be replaced by a selection itself
        before = walk.env[end.source]
        own = along(widths.own(end.source, before)[0], before, end.dim)
        layout = layouts.get((end.source.name, end.dim), own)
        index = end.index[kept]
        there = layout[index]
        rank = (layout.to(torch.int64).cumsum(0) - 1)[index[there]]
        edges = widths.between.get((end.source.name, end.path[0].name), [])
        edge = next((e for e in edges if e.dim == end.dim), None)
        shift = None
        if edge is not None and edge.facts is not None and not bool(there.all()):
            values = torch.where(there, 0.0, edge.facts.values[0][index])
            shift = values.tolist() if bool((values != 0).any()) else None
        found.append(
            Selection(
                node=node.name, producer=end.source.name, dim=end.dim, index=rank.tolist(),
                path=[n.name for n in end.path if n in widths.dropped],
                rank=walk.env[node].dim(), size=int(kept.sum()), shift=shift,
                places=None if bool(there.all()) else indices(there),
            )
        )  # fmt: skip
    return found


def _spread(node: fx.Node, widths: Widths, edge: Edge) -> list[Spread]:
    """Zeros and constants that are put back in front of a node."""
    after = widths.solution.kept(edge.target)
    own = widths.solution.kept(edge.source)[after]
    if bool(own.all()):
        return []
    shift = torch.zeros(own.numel(), dtype=torch.float64)
    if edge.facts is not None:
        shift = torch.where(own, 0.0, edge.facts.values[0][after])
    return [
        Spread(
            producer=edge.producer, consumer=node.name, dim=edge.dim,
            rank=widths.rank_of(edge.producer), size=own.numel(), places=indices(own),
            shift=shift.tolist() if bool((shift != 0).any()) else None,
        )
    ]  # fmt: skip


def _sum(node: fx.Node, widths: Widths, operands: list[Edge]) -> list[Sum]:
    """A residual sum of operands that no longer carry the same channels."""
    names = [a.name for a in node.args if isinstance(a, fx.Node)]
    left, right = sorted(operands, key=lambda e: names.index(e.producer))
    kept = widths.solution.kept
    total = kept(left.target)
    places: list[list[int] | None] = []
    shift = torch.zeros(int(total.sum()), dtype=torch.float64)
    for edge in (left, right):
        own = kept(edge.source)
        places.append(None if bool(own[total].all()) else indices(own[total]))
        if edge.facts is not None:
            shift += torch.where(own, 0.0, edge.facts.values[0])[total]
    if places == [None, None]:
        return []
    return [
        Sum(
            node=node.name, dim=left.dim, rank=widths.walk.env[node].dim(),
            size=int(total.sum()), left=places[0], right=places[1],
            shift=shift.tolist() if bool((shift != 0).any()) else None,
        )
    ]  # fmt: skip

"""From a solution to a plan: what is sliced, where the graph is cut, where constants go."""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from demp_fx.calls import called
from demp_fx.channels.blocks import dim_masks, outer_to_inner, repeats_along
from demp_fx.channels.constants import foldable
from demp_fx.channels.labels import varying
from demp_fx.channels.network import CATS
from demp_fx.channels.places import SIZES
from demp_fx.channels.solve import Solution
from demp_fx.channels.system import Edge
from demp_fx.channels.walk import Walk
from demp_fx.passes.count import counts
from demp_fx.passes.folds import foldings, indices
from demp_fx.passes.plan import (
    Frozen,
    Gather,
    Literal,
    PruningPlan,
    Regroup,
    Selection,
    Spread,
    Sum,
)
from demp_fx.passes.resize import Masks, MisfitError, Sizes, literals
from demp_fx.passes.scalars import frozen_scalars, narrower_sizes
from demp_fx.trees import tensors_of


def plan_of(walk: Walk, solution: Solution) -> PruningPlan:
    """The plan that carries out a solution on the graph that was walked.

    Raises `MisfitError` where a node cannot do with the sizes that it would get.
    """
    return _Planner(walk, solution).plan()


@dataclass
class _Planner:
    walk: Walk
    solution: Solution
    cache: dict[fx.Node, tuple[Masks, Masks]] = field(default_factory=dict)
    labels: dict[Any, tuple[Masks, Masks] | None] = field(default_factory=dict)
    dropped: set[fx.Node] = field(default_factory=set)
    misfits: dict[fx.Node, None] = field(default_factory=dict)

    def plan(self) -> PruningPlan:
        plan = PruningPlan()
        self.dropped = self._dropped()
        self._groupings(plan)
        self._keep(plan)
        sizes = Sizes(
            self.walk.env, self.masks, self.seen, lambda node: self._cached(node)[1], self.merged,
            self.walk.crops.sizes.varies,
        )  # fmt: skip
        sizes.changed.update(narrower_sizes(self.walk.graph, sizes))
        written: list[Literal] = []
        for node in self.walk.env:
            if node in self.dropped:
                continue
            new = sizes.new(node)
            blocks = plan.grouped.get(str(node.target)) if node.op == "get_attr" else None
            if blocks is not None:  # of a convolution that is called as a function
                new = {**new, 1: len(blocks[0])}
            if new:
                plan.nodes[node.name] = new
            try:
                written += literals(node, sizes)
            except MisfitError as error:
                self.misfits.update(dict.fromkeys(error.nodes))
        if self.misfits:
            raise MisfitError(*self.misfits)
        plan.counts = counts(self.walk.layers, sizes)
        numbers = frozen_scalars(self.walk.graph, sizes)
        plan.literals = written + [n for n in numbers if isinstance(n, Literal)]
        plan.frozen = [n for n in numbers if isinstance(n, Frozen)]
        self._edges(plan)
        folds = foldable(self.walk.system)
        readers = {read.fold: read for read in self.walk.system.reads if id(read) in folds}
        for read in readers.values():  # one for each weight: what it folds serves all others
            plan.folds += foldings(read, folds[id(read)], self.solution)
        return plan

    def _keep(self, plan: PruningPlan) -> None:
        """What stays of parameters and buffers. Axes that keep the same have one list for it."""
        params = {k: v.data for k, v in self.walk.params.items() if v.data is not None}
        axes = [a for a in self.walk.system.axes if a.dim >= 0 and a.owner in params]
        kept = np.flatnonzero(self.solution.mask.numpy())
        firsts, lasts = (
            np.searchsorted(kept, np.array(ends, dtype=np.int64)).tolist()
            for ends in ([a.start for a in axes], [a.stop for a in axes])
        )
        lists: dict[bytes, list[int]] = {}
        for axis, first, last in zip(axes, firsts, lasts, strict=True):
            if last - first < axis.size:
                index = kept[first:last] - axis.start
                key = index.tobytes()
                if key not in lists:
                    lists[key] = index.tolist()
                plan.keep.setdefault(axis.owner, {})[axis.dim] = lists[key]
                plan.shapes[axis.owner] = list(params[axis.owner].shape)

    def _groupings(self, plan: PruningPlan) -> None:
        """Which inputs each block of filters of a grouped convolution keeps."""
        for grouping in self.walk.system.groupings:
            second = self.solution.kept(grouping.second)
            alive = second.any(1)
            told = second.size(1) > 1 or bool(self.solution.kept(grouping.first).all())
            if bool(second.all()) and told:  # else the layer takes each filter for a group
                continue
            if grouping.consumer is not None:
                filters = int(self.solution.kept(grouping.first)[alive][0].sum())
                plan.regroups.append(
                    Regroup(
                        producer=grouping.weight, consumer=grouping.consumer,
                        rank=self.rank_of(grouping.weight), filters=filters,
                        index=[indices(mask) for mask in second[alive]],
                    )
                )  # fmt: skip
            else:
                plan.grouped[grouping.weight] = [indices(mask) for mask in second[alive]]
                value = self.walk.params[grouping.weight].data
                assert value is not None
                plan.shapes[grouping.weight] = list(value.shape)

    def masks(self, node: fx.Node) -> Masks:
        """Which indices of each narrower dim of a node's value stay, by its own labels."""
        return self._cached(node)[0]

    @functools.cached_property
    def _into(self) -> dict[tuple[str, str], list[Edge]]:
        """The edges between two nodes."""
        found: dict[tuple[str, str], list[Edge]] = defaultdict(list)
        for edge in self.walk.system.edges:
            found[edge.producer, edge.consumer].append(edge)
        return found

    def seen(self, node: fx.Node, source: fx.Node) -> Masks:
        """`masks` of an input as `node` gets it: behind the edge between them, if there is one."""
        edges = self._into.get((source.name, node.name))
        if edges is None:
            return self.masks(source)
        masks = dict(self.masks(source))
        for edge in edges:
            masks[edge.dim] = self.solution.kept(edge.target)
        return {d: mask for d, mask in masks.items() if not bool(mask.all())}

    def merged(self, node: fx.Node) -> set[int]:
        """Dims along which the channels repeat themselves."""
        value = self.walk.env.get(node)
        return {
            d
            for label in (self.walk.value(value).labels if isinstance(value, Tensor) else ())
            for d in varying(label)
            if repeats_along(label, d)
        }

    def _cached(self, node: fx.Node) -> tuple[Masks, Masks]:
        found = self.cache.get(node)
        if found is None:
            value = self.walk.env.get(node)
            found = self.cache[node] = ({}, {})
            ends = self.walk.chains.selections  # they have their channels, however they are made
            if isinstance(value, Tensor) and (node not in self.dropped or node in ends):
                self.cache[node] = found = self._masks(node, value)
        return found

    def _masks(self, node: fx.Node, tensor: Tensor) -> tuple[Masks, Masks]:
        masks: Masks = {}
        ragged: Masks = {}
        for label in self.walk.value(tensor).labels:
            key = label.data_ptr(), label.shape, label.stride()  # many nodes carry the same one
            if key not in self.labels:
                self.labels[key] = self._along(label)
            found = self.labels[key]
            if found is None:
                self.misfits[node] = None
                continue
            for d, mask in found[0].items():
                masks[d] = masks[d] & mask if d in masks else mask
            ragged |= found[1]
        return masks, ragged

    def _along(self, label: Tensor) -> tuple[Masks, Masks] | None:
        """Which indices of each dim stay by one label; None where its blocks are not equal."""
        kept = self.solution.kept(label)
        if bool(kept.all()):
            return {}, {}
        dims = varying(label)
        if len(dims) < 2:
            return {dims[0]: kept.reshape(-1)}, {}
        found = dim_masks(kept, outer_to_inner(label))
        if found is None:
            return None
        return {d: mask for d, mask in found[0].items() if not bool(mask.all())}, found[1]

    # -- arrangements ---------------------------------------------------------------------------

    def _dropped(self) -> set[fx.Node]:
        """Movements that are replaced, and what leads to them alone."""
        chains, dropped = self.walk.chains, set()
        for node, end in chains.selections.items():
            first = tensors_of(self.walk.env[end.path[0]])
            labels = [*end.broken, *(x for t in first for x in self.walk.value(t).labels)]
            if not all(bool(self.solution.kept(x).all()) for x in labels):
                dropped |= {node} | (set(end.path) & chains.loose)
        return dropped

    def _selections(self, layouts: dict[tuple[str, int], Tensor]) -> list[Selection]:
        found = []
        for node, end in self.walk.chains.selections.items():
            if node not in self.dropped:
                continue
            label = next((x for x in self.walk.value(self.walk.env[node]).labels
                          if varying(x) == (end.dim,)), None)  # fmt: skip
            kept = torch.ones_like(end.index, dtype=torch.bool)  # of one that is taken alone
            if label is not None:
                kept = self.solution.kept(label.reshape(-1))
            # by its labels, though it may be replaced by a selection itself
            before = self.walk.env[end.source]
            own = _mask(self._masks(end.source, before)[0], before, end.dim)
            layout = layouts.get((end.source.name, end.dim), own)
            index = end.index[kept]
            there = layout[index]
            rank = (layout.to(torch.int64).cumsum(0) - 1)[index[there]]
            edges = self._into.get((end.source.name, end.path[0].name), [])
            edge = next((e for e in edges if e.dim == end.dim), None)
            shift = None
            if edge is not None and edge.facts is not None and not bool(there.all()):
                values = torch.where(there, 0.0, edge.facts.values[0][index])
                shift = values.tolist() if bool((values != 0).any()) else None
            found.append(
                Selection(
                    node=node.name, producer=end.source.name, dim=end.dim, index=rank.tolist(),
                    path=[n.name for n in end.path if n in self.dropped],
                    rank=self.walk.env[node].dim(), size=int(kept.sum()), shift=shift,
                    places=None if bool(there.all()) else indices(there),
                )
            )  # fmt: skip
        return found

    # -- cuts -----------------------------------------------------------------------------------

    def _edges(self, plan: PruningPlan) -> None:
        """Turn every edge with different channels on its two sides into a gather or a sum."""
        kept = self.solution.kept
        into: dict[str, list[Edge]] = defaultdict(list)
        wanted: dict[tuple[str, str, int], Tensor] = {}
        dropped = {node.name for node in self.dropped}
        for edge in self.walk.system.edges:
            if edge.consumer in dropped:
                continue
            want = kept(edge.target)
            into[edge.consumer].append(edge)
            wanted[edge.producer, edge.consumer, edge.dim] = (
                want & kept(edge.source) if edge.kind != "gather" else want
            )
        layouts: dict[tuple[str, int], Tensor] = {}
        for node in self.walk.graph.graph.nodes:
            edges = into.get(node.name)
            if edges is None:
                continue
            for edge in edges:
                layouts.setdefault((edge.producer, edge.dim), kept(edge.source))
            self._join(plan, node, edges, layouts, wanted)
            for edge in edges:
                if edge.kind == "spread":
                    plan.spreads += self._spread(node, edge)
            operands = [e for e in edges if e.kind == "sum"]
            if len(operands) == 2:
                plan.sums += self._sum(node, operands)
        plan.selections = self._selections(layouts)
        for (producer, consumer, dim), want in wanted.items():
            layout = layouts[producer, dim]
            if not torch.equal(layout, want):
                index = indices(want[layout])
                plan.gathers.append(
                    Gather(producer=producer, consumer=consumer, dim=dim, index=index)
                )

    def _join(
        self, plan: PruningPlan, node: fx.Node, edges: list[Edge],
        layouts: dict[tuple[str, int], Tensor], wanted: dict[tuple[str, str, int], Tensor],
    ) -> None:  # fmt: skip
        """Gathers in front of a concat become one behind it; not where what it has made is then
        written into while others read it, as that would go to a copy."""
        if node.target not in CATS or len(node.args) == 0:
            return
        if len(node.users) > 1 and self.walk.version(self.walk.env[node]):
            return
        pieces: Any = node.args[0]
        rank = self.walk.env[node].dim()
        dim = (node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)) % rank
        keys = [(e.producer, node.name, dim) for e in edges if e.dim == dim]
        cut = [k for k in keys if not torch.equal(wanted[k], layouts[k[0], dim])]
        if len(cut) < 2:
            return
        parts = [
            layouts.get((p.name, dim), _mask(self.masks(p), self.walk.env[p], dim)) for p in pieces
        ]
        layout = layouts[node.name, dim] = torch.cat(parts)
        plan.nodes[node.name] = {**plan.nodes.get(node.name, {}), dim: int(layout.sum())}
        for key in keys:
            wanted[key] = layouts[key[0], dim]
        own = _mask(self.masks(node), self.walk.env[node], dim)
        for user in node.users:
            if called(user) not in SIZES and user not in self.dropped:
                wanted.setdefault((node.name, user.name, dim), own)

    def _spread(self, node: fx.Node, edge: Edge) -> list[Spread]:
        """Zeros and constants that are put back in front of a node."""
        after = self.solution.kept(edge.target)
        own = self.solution.kept(edge.source)[after]
        if bool(own.all()):
            return []
        shift = torch.zeros(own.numel(), dtype=torch.float64)
        if edge.facts is not None:
            shift = torch.where(own, 0.0, edge.facts.values[0][after])
        return [
            Spread(
                producer=edge.producer, consumer=node.name, dim=edge.dim,
                rank=self.rank_of(edge.producer), size=own.numel(), places=indices(own),
                shift=shift.tolist() if bool((shift != 0).any()) else None,
            )
        ]  # fmt: skip

    def rank_of(self, name: str) -> int:
        """How many dims the value of a node has."""
        return self._ranks[name]

    @functools.cached_property
    def _ranks(self) -> dict[str, int]:
        return {n.name: v.dim() for n, v in self.walk.env.items() if isinstance(v, Tensor)}

    def _sum(self, node: fx.Node, operands: list[Edge]) -> list[Sum]:
        """A residual sum of operands that no longer carry the same channels."""
        names = [a.name for a in node.args if isinstance(a, fx.Node)]
        left, right = sorted(operands, key=lambda e: names.index(e.producer))
        kept = self.solution.kept
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
                node=node.name, dim=left.dim, rank=self.walk.env[node].dim(),
                size=int(total.sum()), left=places[0], right=places[1],
                shift=shift.tolist() if bool((shift != 0).any()) else None,
            )
        ]  # fmt: skip


def _mask(masks: Masks, tensor: Tensor, dim: int) -> Tensor:
    found = masks.get(dim)
    return torch.ones(tensor.size(dim), dtype=torch.bool) if found is None else found

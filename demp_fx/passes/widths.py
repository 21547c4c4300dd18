"""Which indices of each value of a graph stay, by the labels that it carries."""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from demp_fx.channels.blocks import dim_masks, outer_to_inner, repeats_along
from demp_fx.channels.constraints import Edge
from demp_fx.channels.labels import varying
from demp_fx.channels.solution import Solution
from demp_fx.channels.walk import Walk
from demp_fx.passes.sizes import Masks
from demp_fx.trees import tensors_of


@dataclass(frozen=True)
class Widths:
    """What a solution leaves of every value of the graph that was walked.

    `misfits`: nodes of which it would leave blocks that are not equal, as far as they were asked
    for.
    """

    walk: Walk
    solution: Solution
    misfits: dict[fx.Node, None] = field(default_factory=dict)
    _found: dict[fx.Node, tuple[Masks, Masks]] = field(default_factory=dict)
    _labels: dict[Any, tuple[Masks, Masks] | None] = field(default_factory=dict)

    def masks(self, node: fx.Node) -> Masks:
        """Which indices of each narrower dim of a node's value stay, by its own labels."""
        return self._cached(node)[0]

    def blocks(self, node: fx.Node) -> Masks:
        """For dims on which other indices stay in each block, the masks of all blocks."""
        return self._cached(node)[1]

    def seen(self, node: fx.Node, source: fx.Node) -> Masks:
        """`masks` of an input as `node` gets it: behind the edge between them, if there is one."""
        edges = self.between.get((source.name, node.name))
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

    @functools.cached_property
    def between(self) -> dict[tuple[str, str], list[Edge]]:
        """The edges between two nodes."""
        found: dict[tuple[str, str], list[Edge]] = defaultdict(list)
        for edge in self.walk.system.edges:
            found[edge.producer, edge.consumer].append(edge)
        return found

    @functools.cached_property
    def dropped(self) -> set[fx.Node]:
        """Movements that are replaced, and what leads to them alone."""
        chains, dropped = self.walk.chains, set()
        for node, end in chains.selections.items():
            first = tensors_of(self.walk.env[end.path[0]])
            labels = [*end.broken, *(x for t in first for x in self.walk.value(t).labels)]
            if not all(bool(self.solution.kept(x).all()) for x in labels):
                dropped |= {node} | (set(end.path) & chains.loose)
        return dropped

    def rank_of(self, name: str) -> int:
        """How many dims the value of a node has."""
        return self._ranks[name]

    @functools.cached_property
    def _ranks(self) -> dict[str, int]:
        return {n.name: v.dim() for n, v in self.walk.env.items() if isinstance(v, Tensor)}

    def _cached(self, node: fx.Node) -> tuple[Masks, Masks]:
        found = self._found.get(node)
        if found is None:
            value = self.walk.env.get(node)
            found = self._found[node] = ({}, {})
            ends = self.walk.chains.selections  # they have their channels, however they are made
            if isinstance(value, Tensor) and (node not in self.dropped or node in ends):
                self._found[node] = found = self.own(node, value)
        return found

    def own(self, node: fx.Node, tensor: Tensor) -> tuple[Masks, Masks]:
        """`masks` and `blocks` of a node's value, whether it is replaced or not."""
        masks: Masks = {}
        ragged: Masks = {}
        for label in self.walk.value(tensor).labels:
            key = label.data_ptr(), label.shape, label.stride()  # many nodes carry the same one
            if key not in self._labels:
                self._labels[key] = self._along(label)
            found = self._labels[key]
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


def along(masks: Masks, tensor: Tensor, dim: int) -> Tensor:
    """Which indices of one dim of a tensor stay, be it all of them."""
    found = masks.get(dim)
    return torch.ones(tensor.size(dim), dtype=torch.bool) if found is None else found

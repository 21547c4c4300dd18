"""Chains of data movement: view, transpose, flatten and the like, from one node to another.

Such a chain that ends in an arrangement of its source's channels (a channel shuffle, a roll) is one
`index_select`, whatever it does on the way. One that ends in blocks (heads) is kept, and its blocks
are to stay equal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from demp_fx.calls import perform
from demp_fx.channels.blocks import recurs_along
from demp_fx.channels.labels import Labels, varying
from demp_fx.tracing.regions import regions_of


@dataclass(frozen=True)
class Chain:
    """The movements `path` from `source` to its last node; `broken`: the labels whose movement is
    not to be kept if they get narrower."""

    source: fx.Node
    path: tuple[fx.Node, ...]
    broken: Labels


@dataclass(frozen=True)
class Selection(Chain):
    """A chain whose last node is `source.index_select(dim, index)`."""

    dim: int
    index: Tensor


class Chains:
    """The chains of one graph.

    `open`: nodes within a chain. `selections`: ends of chains that are arrangements of the source.
    `loose`: nodes that lead to nothing else, and need not work on narrower tensors.
    """

    def __init__(self, graph: fx.GraphModule, env: Mapping[fx.Node, Any]) -> None:
        self.graph, self.env = graph, env
        self.open: dict[fx.Node, Chain] = {}
        self.selections: dict[fx.Node, Selection] = {}
        self.loose: set[fx.Node] = set()
        self.regions = regions_of(graph.graph)

    def extend(self, node: fx.Node, source: fx.Node, labels: Labels, broken: Labels) -> bool:
        """Go on from `source` to `node`, whose value has `labels`; those in `broken` were moved in
        a way that narrowing breaks.

        False where the value is in one piece again, but not an arrangement of the source's.
        """
        before = self.open.get(source, Chain(source, (), ()))
        if before.path and self.regions[before.path[0]] != self.regions[node]:
            return False  # its gradient ends on the way
        chain = Chain(before.source, (*before.path, node), (*before.broken, *broken))
        if not is_flat(labels) or not isinstance(self.env[node], Tensor):
            self.open[node] = chain
            return True
        dims = {d for label in (*labels, *chain.broken) for d in varying(label)}
        found = self._selection(chain, dims)
        if found is None:
            return not chain.broken
        self.selections[node] = found
        return True

    def _selection(self, chain: Chain, dims: set[int]) -> Selection | None:
        """Move the numbers of all places along the chain, and see whether one axis was picked (and
        the gradient with it)."""
        source = self.env[chain.source]
        # some of the labels are of values on the way, which may have more dims
        dims = {d for d in dims if d < source.dim() and not _is_merged(source, d)}
        places = torch.arange(source.numel(), dtype=torch.float64).reshape(source.shape)
        try:
            with torch.enable_grad():
                result = self._run(chain, places.requires_grad_())
        except (RuntimeError, NotImplementedError, TypeError):
            return None
        if not isinstance(result, Tensor) or result.dim() != source.dim():
            return None
        if not result.requires_grad:  # behind a detach
            return None
        places, result = places.detach().long(), result.detach().long()
        for dim in dims:
            rest = [d for d in range(source.dim()) if d != dim]
            if any(result.size(d) != source.size(d) for d in rest) or not result.numel():
                continue
            line = result.permute(dim, *rest).reshape(result.size(dim), -1)[:, 0]
            index = line // places.stride(dim) % source.size(dim)
            if torch.equal(places.index_select(dim, index), result):
                return Selection(chain.source, chain.path, chain.broken, dim, index)
        return None

    def _run(self, chain: Chain, value: Any) -> Any:
        before = chain.source
        for node in chain.path:
            feed = functools.partial(_feed, {before: value}, self.env)
            args, kwargs = map_arg((node.args, node.kwargs), feed)
            value = perform(node, self.graph, args, kwargs)
            before = node
        return value

    def settle(self, is_size: Callable[[fx.Node], bool]) -> list[tuple[fx.Node, Labels]]:
        """The nodes within chains that are used as they are, and the labels broken up to each."""
        used = []
        for node in reversed(self.open):
            for user in node.users:
                end = self.selections.get(user)
                if is_size(user) or (end is not None and node in end.path):
                    continue
                chain = self.open.get(user)
                if chain is not None and node in chain.path and user in self.loose:
                    continue
                used.append((node, self.open[node].broken))
                break
            else:
                self.loose.add(node)
        return used


def _feed(known: Mapping[fx.Node, Any], env: Mapping[fx.Node, Any], node: fx.Node) -> Any:
    """What a node on the way gives; of a buffer (an index, say) the numbers in it."""
    if node in known:
        return known[node]
    value = getattr(env[node], "demp", None)
    return env[node] if value is None or value.data is None else value.data


def _is_merged(tensor: Tensor, dim: int) -> bool:
    """Whether channels lie along a dim together with another axis, which may be as long as the
    input is: where they are then depends on that."""
    value = getattr(tensor, "demp", None)
    labels = () if value is None else value.labels
    return any(dim in varying(label) and recurs_along(label, dim) for label in labels)


def is_flat(labels: Labels) -> bool:
    """Whether every label varies on one dim only, and no two on the same."""
    dims = [varying(label) for label in labels]
    return all(len(d) == 1 for d in dims) and len(set(dims)) == len(dims)

"""Crops at a size of the input, `table[:, : x.shape[1]]`: another input reads other entries."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from demp_fx.calls import ASKS, called
from demp_fx.channels.blocks import recurs_along
from demp_fx.channels.input_sizes import InputSizes
from demp_fx.channels.labels import varying
from demp_fx.channels.places import Places

aten = torch.ops.aten
_NARROWS = {"narrow", torch.narrow, aten.narrow.default, aten.slice.Tensor}
_CHUNKS = {"chunk", torch.chunk, aten.chunk.default}
_SPLITS = {"split", torch.split, "split_with_sizes", torch.split_with_sizes, aten.split.Tensor,
           aten.split_with_sizes.default, *_CHUNKS}  # fmt: skip


@dataclass(frozen=True)
class Crops:
    """The crops of a walk over the nodes of a graph."""

    walk: Places

    @functools.cached_property
    def sizes(self) -> InputSizes:
        """Which numbers are worked out of sizes of the input."""
        return InputSizes(self.walk.env, self._channels)

    def dims(self, node: fx.Node) -> set[int]:
        """The dims that a node crops at a size of the input. What the example reads there is not
        all that is read: that stays."""
        source = node.args[0] if node.args else None
        tensor = self.walk.env[source] if isinstance(source, fx.Node) else None
        if not isinstance(tensor, Tensor):
            return set()
        value, dims = self.walk.value(tensor), cropped_dims(node, tensor.dim(), self.varies)
        for d in halved_dims(node, tensor.dim(), self.varies):
            if any(self._merged(x, d) for x in value.labels if d in varying(x)):
                dims.add(d)
        for label in value.labels if dims else ():
            if dims & set(varying(label)):
                self.walk.system.pin(label, "is cropped at a size of the input", self.walk.site)
        return dims

    def whole(self, tensor: Tensor, dims: set[int]) -> Tensor:
        """What a crop is taken from, as the crop sees it: along `dims` it has no channels, as
        inputs have none, and what is known holds for all of it."""
        value = self.walk.value(tensor)
        labels = tuple(x for x in value.labels if not dims & set(varying(x)))
        if value.data is None or value.vector:
            known = value.facts
        else:
            known = self.walk.slices(value.data, dims) if self.walk.with_facts else None
        if known is not None:
            known = known.aligned(tensor.dim()).uniform(dims)
        alias = tensor.detach()
        alias.__dict__["demp"] = replace(
            value, labels=labels, known=known, data=None, vector=False, rows=None
        )
        return alias

    def varies(self, end: fx.Node) -> bool:
        """Whether a number or sizes that a node holds depend on the input's."""
        return end in self.walk.given and self.sizes.varies(end)

    def _channels(self, node: fx.Node) -> set[int]:
        """The dims of what a node has given that are as long for any input: they have channels, and
        these alone."""
        labels = self.walk.value(self.walk.env[node]).labels
        return {d for label in labels for d in varying(label) if not self._merged(label, d)}

    def _merged(self, label: Tensor, dim: int) -> bool:
        """Whether channels are merged with, or joined to, what may be as long as the input is."""
        return not bool(label.all()) or (self.walk.merged and recurs_along(label, dim))


def halved_dims(node: fx.Node, rank: int, varies: Callable[[fx.Node], bool]) -> set[int]:
    """The dims that `node` splits into a number of parts, or into parts of a size that `varies`."""
    if called(node) not in _SPLITS:
        return set()
    size: Any = node.args[1] if len(node.args) > 1 else None
    asked = size if isinstance(size, (list, tuple)) else (size,)
    dim: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    named = any(isinstance(n, fx.Node) and varies(n) for n in asked)
    return {dim % rank} if named or called(node) in _CHUNKS else set()


def _is_size(end: Any, source: Any, dim: int) -> bool:
    """Whether a number is the size of a dim of `source`, asked there."""
    if not isinstance(end, fx.Node):
        return False
    if end.target is operator.getitem and isinstance(end.args[0], fx.Node):
        asked = end.args[0]
        return called(asked) in ASKS and asked.args[0] is source and bool(end.args[1] == dim)
    return called(end) == "size" and end.args[0] is source and end.args[1:] == (dim,)


def cropped_dims(node: fx.Node, rank: int, varies: Callable[[fx.Node], bool]) -> set[int]:
    """The dims that `node` crops at a size, or picks at one, which `varies` with the input; `rank`:
    of the tensor it crops."""
    bounds = [a for a in node.args[2:] if isinstance(a, fx.Node)]
    if called(node) in _NARROWS and any(map(varies, bounds)):
        dim: Any = node.args[1]
        return {dim % rank}
    if node.target is not operator.getitem:
        return set()
    index: Any = node.args[1]
    entries = index if isinstance(index, tuple) else (index,)
    taken = sum(1 for e in entries if e is not None and e is not Ellipsis)
    dims, dim = set(), 0
    for entry in entries:
        if entry is None:
            continue
        if entry is Ellipsis:
            dim += rank - taken
            continue
        ends = (entry.start, entry.stop) if isinstance(entry, slice) else (entry,)
        whole = ends[0] in (None, 0) and _is_size(ends[-1], node.args[0], dim)
        if not whole and any(isinstance(end, fx.Node) and varies(end) for end in ends):
            dims.add(dim)
        dim += 1
    return dims

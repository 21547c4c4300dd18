"""Places to cut: where, between two nodes, channels may go that one side does not need.

Behind a cut the channels have atoms of their own; the edge between says what the two sides owe each
other. What is written in place closes the cuts that it would go around.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from demp_fx.calls import called
from demp_fx.channels.blanks import catch_up
from demp_fx.channels.labels import Labels, along, repeats, varying
from demp_fx.channels.stream import Rule, Stream
from demp_fx.channels.system import Edge, Mark, Read, Site
from demp_fx.channels.value import Value
from demp_fx.channels.writes import carried, filled, known_of, memory_of, mixed, refined
from demp_fx.shapes import Shape

aten = torch.ops.aten
IN_PLACE_SUMS = {operator.iadd, "add_", aten.add_.Tensor}
SUMS = {operator.add, torch.add, "add", aten.add.Tensor, *IN_PLACE_SUMS}
CHANGED = "it is changed in place while others read it"
SIZES = {getattr, "size", "dim", "numel", "ndimension", aten.sym_size.int}


class Places(Stream):
    """A stream of ATen ops under the nodes of a graph: `env` holds what each has given.

    `given`: nodes that depend on the network's inputs; `made`: those that are computed of
    parameters alone, such as a standardised weight; `lent`: the sizes of the input in these;
    `joined`: those of them that hold several side by side; `exits`: nodes behind which blocks end.
    """

    def __init__(
        self, rule_of: Callable[[torch._ops.OpOverload], Rule], shapes: Mapping[Any, Shape],
        with_facts: bool, labelled: bool,
    ) -> None:  # fmt: skip
        super().__init__(rule_of, shapes, with_facts, labelled)
        self.env: dict[fx.Node, Any] = {}
        self.cut_at: dict[int, int] = {}
        self.exits: set[fx.Node] = set()
        self.given: set[fx.Node] = set()
        self.made: set[fx.Node] = set()
        self.lent: dict[fx.Node, set[int]] = {}
        self.joined: set[fx.Node] = set()

    def _enter(self, n: fx.Node, user: fx.Node, spread: bool = False, fixed: bool = False) -> Any:
        """The value of `n` as `user` sees it: behind fresh atoms where the graph may be cut.

        That is: in a residual sum; before one reader of several; and further down such a branch,
        wherever its values have become smaller (behind a pooling, say), so that a cut costs less;
        where zeros can be put back (`spread`); and where a weight that is computed of parameters
        meets what is computed of inputs, if the weight must keep channels that those can lose.
        `fixed`: the size of its axis is known.
        """
        tensor = self.env[n]
        if not isinstance(tensor, Tensor) or n.op == "get_attr" or called(user) in SIZES:
            return tensor
        if user in self.made:
            return tensor
        value = self.value(tensor)
        if not value.labels or value.version != self.version(tensor):
            return tensor
        if self._is_sum(user):
            return self._cut(n, user, tensor, value, "sum", fixed)
        readers = sum(1 for reader in n.users if called(reader) not in SIZES)
        if n in self.made:
            only = value.labels
            if readers == 1 and n not in self.joined and not fixed:
                only = self._pinned(value)
            return self._cut(n, user, tensor, value, "gather", fixed, only)
        if spread:
            return self._cut(n, user, tensor, value, "spread", fixed)
        if readers > 1 or n in self.exits or self._smaller(tensor, value):
            return self._cut(n, user, tensor, value, "gather")
        return tensor

    def _label(self, n: fx.Node, merge: bool = False) -> None:
        """A weight that is computed in a way that nobody follows has channels all the same, which
        it must keep, and which its readers may do without; but none where it is as long as inputs
        are. So, with `merge`, have axes on which there are several."""
        tensor = self.env[n]
        value = self.value(tensor)
        if value.data is not None or value.blank or not _holds_numbers(tensor):
            return
        labels, site = list(value.labels), Site(str(n.op), n.name, n.meta.get("source"))
        lent = self.lent.get(n, set())
        areas = {a * b for a in lent for b in lent}
        lent = lent | areas | {area * size for area in areas for size in lent}  # flattened
        for d, size in enumerate(tensor.shape):
            there = [x for x in labels if d in varying(x)]
            mixed = [x for x in there if varying(x) == (d,)] if merge else []
            if size > 1 and (len(mixed) > 1 if there else size not in lent):
                atoms = self.system.fresh(n.name, -1, size).atoms
                for x in (*mixed, atoms):
                    self.system.pin(x, "is computed of all of its channels", site)
                labels = [x for x in labels if all(x is not y for y in mixed)]
                labels.append(along(atoms, tensor.dim(), d))
        self.relabel(tensor, tuple(labels))

    def _smaller(self, tensor: Tensor, value: Value) -> bool:
        """Whether a channel holds fewer numbers here than where the graph was last cut."""
        label = value.labels[0]
        there = self.cut_at.get(int(label.reshape(-1)[0])) if self.cut_at else None
        return there is not None and tensor.numel() // label.numel() < there

    def _pinned(self, value: Value) -> Labels:
        """The labels along one dim with channels that some op has already said must stay, or that
        were summed over on the way to a weight."""
        stays = torch.zeros(self.system.atoms, dtype=torch.bool)
        needed = [pin.atoms for pin in self.system.pins]
        on_the_way = {n.name for n in self.made}
        needed += [r.inputs for r in self.system.reads if r.site.node in on_the_way]
        if needed:
            stays[torch.cat(needed)] = True
        return tuple(x for x in value.labels if len(varying(x)) == 1 and bool(stays[x].any()))

    def _cut(
        self, n: fx.Node, user: fx.Node, tensor: Tensor, value: Value, kind: str,
        fixed: bool = False, only: Labels | None = None,
    ) -> Tensor:  # fmt: skip
        rank = tensor.dim()
        labels, cut = [], False
        blocks = {d for label in value.labels if len(varying(label)) > 1 for d in varying(label)}
        for label in value.labels:
            dims = varying(label)
            chosen = len(dims) == 1 and (only is None or any(label is one for one in only))
            chosen = chosen and dims[0] not in blocks
            chosen = chosen and bool(label.all())  # else some of it may be as long as the input
            if chosen and (fixed or not (self.merged and repeats(label))):
                d, size = dims[0], label.numel()
                axis = self.system.fresh(f"{n.name}->{user.name}", -1, size)
                facts = value.facts.along(d, size) if value.facts is not None else None
                elements = tensor.numel() // size
                self.system.flow.append(
                    Edge(n.name, user.name, d, label.reshape(-1), axis.atoms, facts, kind,
                         elements, self.site)
                )  # fmt: skip
                if kind == "gather" and only is None:
                    self.cut_at[axis.start] = elements
                label, cut = along(axis.atoms, rank, d), True
            labels.append(label)
        if not cut:
            return tensor
        alias = tensor.detach()
        alias.__dict__["demp"] = Value(
            tuple(labels), value.facts, None, value.version,
            shares=value.shares, table=value.table,
            never_negative=value.never_negative, positive=value.positive, inside=value.inside,
        )  # fmt: skip
        return alias

    def _lost(self, start: Mark, before: Mapping[fx.Node, Value], out: Any) -> list[fx.Node]:
        """Inputs with channels that could be supplied from nowhere (zeros, constants), which the
        node has turned into something that cannot: the last place to supply them is before it."""
        if not isinstance(out, Tensor) or any(
            isinstance(s, Edge) and s.kind == "sum" for s in self.system.since(start)
        ):
            return []
        reads = {s.inputs.data_ptr() for s in self.system.since(start) if isinstance(s, Read)}
        result, found = self.value(out), []
        for n, value in before.items():
            if value.known is None or n.op == "get_attr":
                continue
            for label in value.labels:
                dims, size = varying(label), label.numel()
                if len(dims) != 1 or out.dim() <= dims[0] or out.size(dims[0]) != size:
                    continue
                if label.data_ptr() in reads:
                    continue
                had = _supplied(value, dims[0], size)
                if had is None or not bool(had.any()):
                    continue
                around = (varying(x) for x in result.labels)
                blocks = any(len(place) > 1 and dims[0] in place for place in around)
                has = None if blocks else _supplied(result, dims[0], size)  # there, nothing can be
                if has is None or bool((had & ~has).any()):
                    found.append(n)
                    break
        return found

    def _fixed(self, start: Mark, before: Mapping[fx.Node, Value]) -> list[fx.Node]:
        """Inputs whose channels repeat themselves along an axis, each index of which the node ties
        to a channel of its own: whatever they are merged with is then as long for any input.

        A layer that reads what another one makes stays in its group, as after any flattening,
        unless it hears a channel at some of its places only. And computed weights with several
        channels on one axis, which the node does not tell apart.
        """
        sames = self.system.sames[start[0] :]
        pins = [pin.atoms for pin in self.system.pins[start[1] :]]
        mixed = [n for n, v in before.items() if n in self.made and _is_mixed(v.labels, pins)]
        if not sames:
            return mixed
        reads = [s for s in self.system.since(start) if isinstance(s, Read)]
        alone = any(map(_partly_silent, reads))
        if not (self.merged or alone):
            return mixed
        repeating = {
            label.data_ptr(): n
            for n, value in before.items()
            for label in value.labels
            if n.op != "get_attr" and len(varying(label)) == 1 and repeats(label)
            if n in self.made or alone or not (reads and self._is_a_parameters(label))
        }
        return mixed + [
            repeating[a.data_ptr()]
            for same in sames if repeating
            for a, b in ((same.a, same.b), (same.b, same.a))
            if a.data_ptr() in repeating and not repeats(b)
        ]  # fmt: skip

    def _is_a_parameters(self, label: Tensor) -> bool:
        first = int(label.reshape(-1)[0])
        return any(axis.dim >= 0 for axis in self.system.axes if axis.start <= first < axis.stop)

    def _is_last_use(self, n: fx.Node, running: fx.Node) -> bool:
        """Whether nobody but the `running` node will read what `n` holds, under any name but its
        own, and no later run: then what that node writes may go elsewhere."""
        storage = memory_of(self.env[n])
        return len(n.users) == 1 and not any(
            isinstance(value, Tensor)
            and memory_of(value) == storage
            and (other.op == "get_attr" or any(user not in self.env for user in other.users))
            for other, value in self.env.items()
            if other not in (n, running)
        )

    def _close(self, node: fx.Node, start: Mark, before: Mapping[int, Any]) -> None:
        """No cut before a write that others will see: it would go to a copy."""
        written = {k for k, v in self.writes.items() if before.get(k) != v}
        names = {n.name: n for n in node.all_input_nodes}
        for edge in self.system.since(start):
            if isinstance(edge, Edge):
                n = names[edge.producer]
                shared = memory_of(self.env[n]) in written
                if shared and not self._is_last_use(n, node):
                    self.system.same(edge.source, edge.target, self.site)

    def _is_sum(self, node: fx.Node) -> bool:
        """A residual sum: two activations of one shape, nothing else, no one to see it in place."""
        if called(node) not in SUMS or len(node.args) != 2 or node.kwargs:
            return False
        a, b = node.args
        if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or a is b:
            return False
        x, y = self.env[a], self.env[b]
        if "get_attr" in (a.op, b.op) or not (isinstance(x, Tensor) and isinstance(y, Tensor)):
            return False
        if a in self.made or b in self.made:
            return False
        if called(node) in IN_PLACE_SUMS and not self._is_last_use(a, node):
            return False
        if x.shape != y.shape or x.dtype != y.dtype:
            return False
        p, q = self.value(x).labels, self.value(y).labels
        return len(p) == len(q) == 1 and varying(p[0]) == varying(q[0]) and len(varying(p[0])) == 1

    def _refresh(self, n: fx.Node) -> None:
        """See whether what a node has given was written into since. (That is no part of what its
        reader records, and stays where that is forgotten.)"""
        self._look_again(self.env[n], n.name)

    def _look_again(self, tensor: Any, name: str = "") -> None:
        """The same for a tensor, be it what the node `name` has given or a weight of a layer."""
        if isinstance(tensor, Tensor):
            value = self.value(tensor)
            if value.image_of is not None:
                catch_up(self, tensor)
                value = self.value(tensor)
            if value.version != self.version(tensor):
                self._stale(name, tensor, value)

    def _stale(self, name: str, tensor: Tensor, value: Value) -> None:
        """A tensor was changed in place through another name. Where that put one number everywhere,
        or each channel into itself, it is known what it holds now; else nothing about it can be
        relied on."""
        value = tensor.__dict__["demp"] = replace(value)  # of a parameter the old one is kept
        storage = memory_of(tensor)
        writes = self.writes[storage][value.version :]
        shared = {other.name for other, t in self.env.items()
                  if isinstance(t, Tensor) and memory_of(t) == storage}  # fmt: skip
        edges = [edge for edge in self.system.edges if edge.producer in shared]
        origin = torch.arange(self.system.atoms)
        for edge in edges:
            origin[edge.target] = origin[edge.source]
        fills = all(write.number is not None for write in writes)
        finer = refined(value.labels, writes, origin)
        holds = finer is not None or carried(value.labels, writes, origin)
        for edge in edges:  # no cut on the way: the write would go to a copy
            if fills or holds:
                self.system.same(edge.source, edge.target, self.site)
            elif edge.producer == name:
                self.system.pin(edge.target, CHANGED, self.site)
        for label in () if fills or holds else value.labels:
            self.system.pin(label, CHANGED, self.site)
        if fills and tensor.dim() == 1:
            value.known = filled(value.facts, tensor, writes)
        elif finer is not None:
            value.known = known_of(value.facts, finer, writes)
        elif holds:
            value.known = mixed(value.facts, value.labels, tensor.dim(), writes, origin)
        else:
            value.known = None
        value.vector = value.never_negative = value.positive = False
        value.blank = frozenset()
        value.rows = value.shares = value.never_positive = value.data = None
        if finer is not None:  # along its other axes nothing was written that has channels
            for label in value.labels:
                if not set(varying(label)) <= set(varying(finer)):
                    self.system.pin(label, CHANGED, self.site)
            value.labels = (finer,)
        if fills or holds:
            value.version = self.version(tensor)


def _is_mixed(labels: Labels, pins: list[Tensor]) -> bool:
    """Whether there is a dim with several labels, all of them pinned."""
    dims = [varying(x) for x in labels]
    several = [d for d in set(dims) if dims.count(d) > 1]
    return any(
        all(torch.isin(x, torch.cat(pins)).all() for x in labels if varying(x) == d)
        for d in several if pins
    )  # fmt: skip


def _partly_silent(read: Read) -> bool:
    """Whether a parameter reads a channel at several places, and only some have no weights."""
    if read.fold is None or read.silent is None or not repeats(read.inputs):
        return False
    _, channel = np.unique(read.inputs.numpy(), return_inverse=True)
    silent = np.bincount(channel, read.silent.numpy())
    return bool(((silent > 0) & (silent < np.bincount(channel))).any())


def _holds_numbers(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def is_supplied(value: Value) -> bool:
    """Whether a value has channels of which all is known, which can be put back at any place."""
    for label in value.labels:
        dims = varying(label)
        known = _supplied(value, dims[0], label.numel()) if len(dims) == 1 else None
        if known is not None and bool(known.any()):
            return True
    return False


def _supplied(value: Value, dim: int, size: int) -> Tensor | None:
    facts = value.known.along(dim, size) if value.known is not None else None
    return facts.steady if facts is not None else None

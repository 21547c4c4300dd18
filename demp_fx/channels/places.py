"""Places to cut: where, between two nodes, channels may go that one side does not need.

Behind a cut the channels have atoms of their own; the edge between says what the two sides owe each
other. What is written in place closes the cuts that it would go around.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from demp_fx.calls import SIZES, called
from demp_fx.channels.constraints import Edge, Site
from demp_fx.channels.labels import Labels, along, repeats, varying
from demp_fx.channels.stream import Rule, Stream
from demp_fx.channels.system import Mark
from demp_fx.channels.value import Value
from demp_fx.channels.writes import memory_of
from demp_fx.shapes import Shape

aten = torch.ops.aten
IN_PLACE_SUMS = {operator.iadd, "add_", aten.add_.Tensor}
SUMS = {operator.add, torch.add, "add", aten.add.Tensor, *IN_PLACE_SUMS}


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
            # of a single token, a sum may hold several for another input, one of them in all places
            single = 1 in tensor.shape[1:]
            return self._cut(n, user, tensor, value, "spread" if single else "sum", fixed)
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


def _holds_numbers(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()

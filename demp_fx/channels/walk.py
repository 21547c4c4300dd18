"""The walk: run the fx graph on meta tensors, and let every ATen op say what it couples.

The graph that is rewritten is module-level fx; the graph that is understood is the stream of ATen
ops under it, each attributed to the fx node (and the user's line) that is running. Between the
nodes the walk leaves places where the graph may be cut.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from demp_fx.channels.averages import takes_average
from demp_fx.channels.blocks import nested
from demp_fx.channels.chains import Chains, is_flat, tensors_of
from demp_fx.channels.crops import cropped_dims
from demp_fx.channels.facts import Facts
from demp_fx.channels.labels import Labels, along, varying
from demp_fx.channels.masks import may_mask_all
from demp_fx.channels.meta import as_meta, on_meta, on_zeros, placeholder, without_collection
from demp_fx.channels.stream import Rule, Shape, Stream
from demp_fx.channels.system import Blocks, Edge, Mark, Read, Site, System
from demp_fx.channels.value import Value
from demp_fx.channels.writes import filled
from demp_fx.errors import DempError, UsageError
from demp_fx.inputs import Inputs
from demp_fx.tracing.functions import Apply

aten = torch.ops.aten
IN_PLACE_SUMS = {operator.iadd, "add_", aten.add_.Tensor}
SUMS = {operator.add, torch.add, "add", aten.add.Tensor, *IN_PLACE_SUMS}
CHANGED = "it is changed in place while others read it"
SIZES = {getattr, "size", "dim", "numel", "ndimension", aten.sym_size.int}


class RefusalError(UsageError):
    """A node does not take what it is given."""

    def __init__(self, node: fx.Node, message: str) -> None:
        super().__init__(message)
        self.node = node


class Walk(Stream):
    """A walk over one fx graph.

    `observed`: what calibration saw at the output of a node, by its name: a dim, and facts along
    it. `env` holds the meta value of every node afterwards.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        rule_of: Callable[[torch._ops.OpOverload], Rule],
        shapes: Mapping[Any, Shape],
        observed: Mapping[str, tuple[int, Facts]],
        with_facts: bool = True,
        labelled: bool = True,
    ) -> None:
        super().__init__(rule_of, shapes, with_facts, labelled)
        self.graph, self.observed = graph, observed
        self.env: dict[fx.Node, Any] = {}
        self.real: Callable[[], AbstractContextManager[None]] = nullcontext
        self.cut_at: dict[int, int] = {}
        self.exits: set[fx.Node] = set()
        self.given: set[fx.Node] = set()  # inputs, and what depends on them
        self.made: set[fx.Node] = set()  # of parameters alone: weights that are computed
        self.chains = Chains(graph, self.env)
        notes = graph.meta.get("demp_fx")
        self.opaque: set[str] = set(notes.opaque) if notes is not None else set()

    def run(self, inputs: Inputs) -> System:
        """Walk the whole graph on example `inputs`.

        Raises `UsageError` where the inputs do not fit, naming the node and the user's line.
        """
        example = inputs.map(lambda t: torch.empty_like(t, device="meta"))
        feed = iter(example.args)
        with torch.no_grad(), without_collection(), on_meta(self.graph) as twins:
            self.names, self.real = twins
            for node in self.graph.graph.nodes:
                self.site = Site(str(node.op), node.name, node.meta.get("source"))
                if node.op == "placeholder" or any(n in self.given for n in node.all_input_nodes):
                    self.given.add(node)
                if node.op == "placeholder":
                    self.env[node] = placeholder(node, feed, example.kwargs)
                elif node.op == "output":
                    self._output(node)
                else:
                    self.env[node] = self._node(node)
            self._settle()
        self.system.close()
        return self.system

    # -- nodes ----------------------------------------------------------------------------------

    def _node(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.graph)
        if node.op == "call_module" and str(node.target) in self.opaque:
            args, kwargs = map_arg((node.args, node.kwargs), self.env.__getitem__)
            return self._leaf(self.graph.get_submodule(str(node.target)), args, kwargs)
        if not self.labelled:
            return self._call(node, {n: self.env[n] for n in node.all_input_nodes})
        self._pin_cropped(node)
        sources = [n for n in node.all_input_nodes if tensors_of(self.env[n])]
        if sources and all(n.op == "get_attr" or n in self.made for n in sources):
            self.made.add(node)
        start, writes = self.system.mark(), dict(self.writes)
        entered = {n: self._enter(n, node) for n in node.all_input_nodes}
        before = {n: self.value(t) for n, t in entered.items() if isinstance(t, Tensor)}
        out = self._call(node, entered)
        again = set(self._lost(start, before, out)) if self.with_facts else set()
        again |= (fixed := set(self._fixed(start, before)))
        if self.splits or self.unfit:
            again |= {n for n, value in before.items() if value.labels and n.op != "get_attr"}
        if again and (self.writes == writes or all(self._is_last_use(n, node) for n in again)):
            self.system.forget(start)
            self.writes = writes
            for n, value in before.items():
                entered[n].__dict__["demp"] = value
            entered = {n: self._enter(n, node, n in again, n in fixed)
                       for n in node.all_input_nodes}  # fmt: skip
            out = self._call(node, entered)
        self.env[node] = out
        if self.opens:
            self.exits.add(node)
        if node not in self.given:
            for t in tensors_of(out):
                self.value(t).table = True
        self._shapes(node)
        if self.writes != writes:
            self._close(node, start, writes)
        if node.name in self.observed and isinstance(out, Tensor) and out.dim() > 1:
            dim, seen = self.observed[node.name]
            value = self.value(out)
            value.known = seen.spread(out.dim(), dim).under(value.facts)
        return out

    def _shapes(self, node: fx.Node) -> None:
        """What a node does with the shape of its input: goes on with a chain, or makes blocks."""
        inputs = [n for n in node.all_input_nodes if tensors_of(self.env[n])]
        if self.applied == self.moves and len(inputs) == 1:
            source, unfit = inputs[0], tuple(label for label, _ in self.unfit)
            flat = is_flat(self._labels(source))
            if source in self.chains.open or (flat and (self.splits or self.unfit)):
                if not self.chains.extend(node, source, self._labels(node), unfit):
                    self._pin(self.env[node], "its channels are rearranged with another axis")
                return
        for label, reason in self.unfit:
            self.system.pin(label, reason, self.site)
        for label in self.shaped:
            self._blocks(label)

    def _labels(self, node: fx.Node) -> Labels:
        return tuple(x for t in tensors_of(self.env[node]) for x in self.value(t).labels)

    def _blocks(self, label: Tensor) -> None:
        atoms = nested(label)
        if atoms is None:
            self.system.pin(label, "its channels are rearranged with another axis", self.site)
        elif atoms.dim() > 1:
            self.system.blocks.append(Blocks(atoms, self.site))

    def _settle(self) -> None:
        """Chains that are used on their way: their blocks stay equal."""
        for node, broken in self.chains.settle(lambda user: user.target in SIZES):
            self.site = Site(str(node.op), node.name, node.meta.get("source"))
            for label in broken:
                self.system.pin(label, "its channels are rearranged with another axis", self.site)
            for label in self._labels(node):
                self._blocks(label)

    def _call(self, node: fx.Node, entered: Mapping[fx.Node, Any]) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), entered.__getitem__)
        if node.target is operator.getitem and isinstance(args[0], Tensor):
            args = (args[0], _as_tensors(args[1]))
        self.computed = {
            t.untyped_storage()._cdata: n.name
            for n, t in entered.items()
            if n in self.made and isinstance(t, Tensor)
        }
        self.moves = self.applied = 0
        self.unfit, self.shaped = [], []
        self.splits = self.opens = False
        self.counted = takes_average(node, self.graph)
        self.masked = may_mask_all(node, self.graph, self.given, self.real)
        if isinstance(node.target, Apply):
            return self.function(node.target, args, kwargs)
        start = self.system.mark()
        try:
            with self:
                if node.op == "call_module":
                    return self._module(self.graph.get_submodule(str(node.target)), args, kwargs)
                if node.op == "call_method":
                    return getattr(args[0], str(node.target))(*args[1:], **kwargs)
                return node.target(*args, **kwargs)  # type: ignore[operator]
        except DempError:
            raise
        except Exception as error:
            given = pytree.tree_leaves(list(entered.values()))
            if any(isinstance(t, Tensor) and not t.is_meta for t in given):
                self.system.forget(start)  # the code made a tensor of its own: on meta, too
                return self._call(node, {n: as_meta(v) for n, v in entered.items()})
            where = f" ({self.site.source})" if self.site.source else ""
            shapes = [tuple(t.shape) for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
            raise RefusalError(
                node,
                f"the example inputs do not run through the model: node {node.name!r} "
                f"({node.target}){where} refuses inputs of shape {shapes}: {error}",
            ) from error

    def _module(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Run a module; one of the user's own, whose code may ask for the mode, in both: what
        either of them couples is coupled."""
        if type(module).__module__.startswith("torch.") or not self.labelled:
            return module(*args, **kwargs)
        modes = {m: m.training for m in module.modules()}
        try:
            evaluated = module.eval()(*args, **kwargs)
            trained = module.train()(*args, **kwargs)
        finally:
            for m, mode in modes.items():
                m.training = mode
        for a, b in zip(tensors_of(evaluated), tensors_of(trained), strict=True):
            first, second = self.value(a).labels, self.value(b).labels
            if [x.shape for x in first] != [x.shape for x in second]:
                self._pin((a, b), "its channels are others in the other mode")
            for one, other in zip(first, second, strict=False):
                if one.shape == other.shape:
                    self.system.same(one, other, self.site)
        return trained

    def _leaf(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A submodule that could not be traced: whatever goes into it stays as it is."""
        self._pin((args, kwargs), "it goes into a module that could not be traced")
        try:
            return module(*args, **kwargs)
        except Exception:
            with self.real():
                return on_zeros(module, args, kwargs)

    def _output(self, node: fx.Node) -> None:
        self._pin([self.env[n] for n in node.all_input_nodes], "it is the network's output")

    def _pin(self, tree: Any, reason: str) -> None:
        for leaf in pytree.tree_leaves(tree):
            if isinstance(leaf, Tensor):
                for label in self.value(leaf).labels:
                    self.system.pin(label, reason, self.site)

    def _pin_cropped(self, node: fx.Node) -> None:
        """What the example reads of a table that is cropped at a size is not all that is read."""
        source = node.args[0] if node.args else None
        tensor = self.env[source] if isinstance(source, fx.Node) else None
        if isinstance(tensor, Tensor) and (labels := self.value(tensor).labels):
            dims = cropped_dims(node, tensor.dim(), self.given)
            for label in labels if dims else ():
                if dims & set(varying(label)):
                    self.system.pin(label, "is cropped at a size of the input", self.site)

    # -- places to cut --------------------------------------------------------------------------

    def _enter(self, n: fx.Node, user: fx.Node, spread: bool = False, fixed: bool = False) -> Any:
        """The value of `n` as `user` sees it: behind fresh atoms where the graph may be cut.

        That is: in a residual sum; before one reader of several; and further down such a branch,
        wherever its values have become smaller (behind a pooling, say), so that a cut costs less;
        where zeros can be put back (`spread`); and where a weight that is computed of parameters
        meets what is computed of inputs, if the weight must keep channels that those can lose.
        `fixed`: the size of its axis is known.
        """
        tensor = self.env[n]
        if not isinstance(tensor, Tensor) or n.op == "get_attr" or user.target in SIZES:
            return tensor
        value = self.value(tensor)
        if value.version != self.version(tensor):
            self._stale(n, value)
        if not value.labels or value.version != self.version(tensor):
            return tensor
        if user in self.made:
            return tensor
        if self._is_sum(user):
            return self._cut(n, user, tensor, value, "sum", fixed)
        readers = sum(1 for reader in n.users if reader.target not in SIZES)
        if n in self.made:
            only = self._pinned(value) if readers == 1 else value.labels
            return self._cut(n, user, tensor, value, "gather", only=only)
        if spread:
            return self._cut(n, user, tensor, value, "spread", fixed)
        if readers > 1 or n in self.exits or self._smaller(tensor, value):
            return self._cut(n, user, tensor, value, "gather")
        return tensor

    def _smaller(self, tensor: Tensor, value: Value) -> bool:
        """Whether a channel holds fewer numbers here than where the graph was last cut."""
        label = value.labels[0]
        there = self.cut_at.get(int(label.reshape(-1)[0])) if self.cut_at else None
        return there is not None and tensor.numel() // label.numel() < there

    def _pinned(self, value: Value) -> Labels:
        """The labels along one dim with channels that some op has already said must stay."""
        stays = torch.zeros(self.system.atoms, dtype=torch.bool)
        if self.system.pins:
            stays[torch.cat([pin.atoms for pin in self.system.pins])] = True
        return tuple(x for x in value.labels if len(varying(x)) == 1 and bool(stays[x].any()))

    def _cut(
        self, n: fx.Node, user: fx.Node, tensor: Tensor, value: Value, kind: str,
        fixed: bool = False, only: Labels | None = None,
    ) -> Tensor:  # fmt: skip
        rank = tensor.dim()
        labels, cut = [], False
        for label in value.labels:
            dims = varying(label)
            chosen = len(dims) == 1 and (only is None or any(label is one for one in only))
            if chosen and (fixed or not (self.merged and _repeats(label))):
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
            if value.known is None or n.op == "get_attr" or len(value.labels) != 1:
                continue
            label, dims = value.labels[0], varying(value.labels[0])
            if len(dims) != 1 or out.dim() <= dims[0] or out.size(dims[0]) != label.numel():
                continue
            if label.data_ptr() in reads:
                continue
            had = _supplied(value, dims[0], label.numel())
            has = _supplied(result, dims[0], label.numel())
            if had is not None and bool((had if has is None else had & ~has).any()):
                found.append(n)
        return found

    def _fixed(self, start: Mark, before: Mapping[fx.Node, Value]) -> list[fx.Node]:
        """Inputs whose channels repeat themselves along an axis, each index of which the node ties
        to a channel of its own: whatever they are merged with is then as long for any input."""
        if not self.merged:
            return []
        repeating = {
            label.data_ptr(): n
            for n, value in before.items()
            for label in value.labels
            if n.op != "get_attr" and len(varying(label)) == 1 and _repeats(label)
        }
        return [
            repeating[a.data_ptr()]
            for same in self.system.sames[start[0] :] if repeating
            for a, b in ((same.a, same.b), (same.b, same.a))
            if a.data_ptr() in repeating and not _repeats(b)
        ]  # fmt: skip

    def _is_last_use(self, n: fx.Node, running: fx.Node) -> bool:
        """Whether nobody but the `running` node will read what `n` holds, under any name but its
        own, and no later run: then what that node writes may go elsewhere."""
        storage = self.env[n].untyped_storage()._cdata
        return len(n.users) == 1 and not any(
            isinstance(value, Tensor)
            and value.untyped_storage()._cdata == storage
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
                shared = self.env[n].untyped_storage()._cdata in written
                if shared and not self._is_last_use(n, node):
                    self.system.same(edge.source, edge.target, self.site)

    def _is_sum(self, node: fx.Node) -> bool:
        """A residual sum: two activations of one shape, nothing else, no one to see it in place."""
        if node.target not in SUMS or len(node.args) != 2 or node.kwargs:
            return False
        a, b = node.args
        if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or a is b:
            return False
        x, y = self.env[a], self.env[b]
        if "get_attr" in (a.op, b.op) or not (isinstance(x, Tensor) and isinstance(y, Tensor)):
            return False
        if a in self.made or b in self.made:
            return False
        if node.target in IN_PLACE_SUMS and len(a.users) > 1:
            return False
        if x.shape != y.shape or x.dtype != y.dtype:
            return False
        p, q = self.value(x).labels, self.value(y).labels
        return len(p) == len(q) == 1 and varying(p[0]) == varying(q[0]) and len(varying(p[0])) == 1

    def _stale(self, n: fx.Node, value: Value) -> None:
        """`n` was changed in place through another name. Where that put one number everywhere, it
        is known what `n` holds now; else nothing about it can be relied on."""
        tensor: Tensor = self.env[n]
        storage = tensor.untyped_storage()._cdata
        writes = self.writes[storage][value.version :]
        shared = {other.name for other, t in self.env.items()
                  if isinstance(t, Tensor) and t.untyped_storage()._cdata == storage}  # fmt: skip
        fills = all(write.number is not None for write in writes)
        for edge in self.system.edges:  # no cut on the way: the write would go to a copy
            if edge.producer in shared and fills:
                self.system.same(edge.source, edge.target, self.site)
            elif edge.producer == n.name:
                self.system.pin(edge.target, CHANGED, self.site)
        for label in () if fills else value.labels:
            self.system.pin(label, CHANGED, self.site)
        value.known = filled(value.facts, tensor, writes) if fills else None
        value.vector = value.matrix = False
        if fills:
            value.version = self.version(tensor)


def _as_tensors(index: Any) -> Any:
    """An index with tensors in the places of lists: their numbers are then seen."""
    if isinstance(index, tuple):
        return tuple(_as_tensors(i) for i in index)
    return torch.tensor(index) if isinstance(index, list) else index


def _repeats(label: Tensor) -> bool:
    """Whether channels are merged with another axis: where they are then depends on its size."""
    return int(label.unique().numel()) < label.numel()


def _supplied(value: Value, dim: int, size: int) -> Tensor | None:
    facts = value.known.along(dim, size) if value.known is not None else None
    return facts.steady if facts is not None else None

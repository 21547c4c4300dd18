"""The walk: run the fx graph on meta tensors, and let every ATen op say what it couples.

The graph that is rewritten is module-level fx; the graph that is understood is the stream of ATen
ops under it, each attributed to the fx node (and the user's line) that is running. Between the
nodes the walk leaves places where the graph may be cut.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Set
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from demp_fx.calls import SIZES, called
from demp_fx.channels.again import fixed, is_supplied, lost, wanted_elsewhere
from demp_fx.channels.blanks import catch_up
from demp_fx.channels.blocks import nested
from demp_fx.channels.chains import Chains, is_flat
from demp_fx.channels.circular import circular_in_parts
from demp_fx.channels.constraints import Blocks, Site
from demp_fx.channels.crops import Crops
from demp_fx.channels.facts import Facts, agreed
from demp_fx.channels.labels import Labels, repeats, varying
from demp_fx.channels.meta import on_meta, placeholder, without_collection
from demp_fx.channels.nodes import Nodes, RefusalError
from demp_fx.channels.stale import refresh
from demp_fx.channels.stream import Rule
from demp_fx.channels.system import System
from demp_fx.inputs import Inputs
from demp_fx.shapes import Shape
from demp_fx.tracing.preserve import preserved
from demp_fx.tracing.regions import is_end
from demp_fx.trees import tensors_of


class Walk(Nodes):
    """A walk over one fx graph.

    `observed`: what calibration saw at the output of a node, by its name: a dim, and facts along
    it. `planned`: what a node should give that refuses what it is given; the walk goes on with that
    where there is such a value, and such nodes are `refused`. `env` holds the meta value of every
    node afterwards.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        rule_of: Callable[[torch._ops.OpOverload], Rule],
        shapes: Mapping[Any, Shape],
        observed: Mapping[str, tuple[int, Facts]],
        with_facts: bool = True,
        labelled: bool = True,
        planned: Mapping[str, Tensor] = MappingProxyType({}),
        changing: Mapping[str, Facts | None] = MappingProxyType({}),
    ) -> None:
        super().__init__(graph, rule_of, shapes, with_facts, labelled)
        self.changing, self.observed, self.planned = changing, observed, planned
        self.refused: list[fx.Node] = []
        self.chains = Chains(graph, self.env)
        self.crops = Crops(self)

    def run(self, inputs: Inputs) -> System:
        """Walk the whole graph on example `inputs`.

        Raises `UsageError` where the inputs do not fit, naming the node and the user's line.
        """
        example = inputs.map(lambda t: torch.empty_like(t, device="meta"))
        feed = iter(example.args)
        with (torch.no_grad(), without_collection(), preserved(_coded(self.graph)),
              circular_in_parts(), on_meta(self.graph) as twins):  # fmt: skip
            self.names, self.real = twins
            for node in self.graph.graph.nodes:
                if node.op == "get_attr":
                    self.env[node] = operator.attrgetter(str(node.target))(self.graph)
                    continue
                self.site = Site(str(node.op), node.name, node.meta.get("source"))
                if node.op == "placeholder" or any(n in self.given for n in node.all_input_nodes):
                    self.given.add(node)
                if node.op == "placeholder":
                    self.env[node] = placeholder(node, feed, example.kwargs)
                elif node.op == "output":
                    self._output(node)
                elif (number := self._number(node)) is not None:
                    self.env[node] = number
                else:
                    self.env[node] = self._result(node)
            self._settle()
        self.system.close()
        return self.system

    def rewritten(self) -> dict[str, Facts | None]:
        """The parameters and buffers that the graph computes with and writes to (a state, a cache,
        an average), where less is known of them then than was taken for known: what is left."""
        found: dict[str, Facts | None] = {}
        for tensor in self.env.values():
            name, real = self.names.get(id(tensor), ("", tensor))
            if name not in self.system.stores or not self.version(tensor):
                continue
            first, value, left = name not in self.changing, self.value(tensor), None
            if first and not self.system.uses_of(name):
                continue
            if value.known is not None and value.version == self.version(tensor):
                before = Facts.exactly(real) if first else self.changing[name]
                left = None if before is None else agreed(before, value.known)
            if first or not _alike(left, self.changing[name]):
                found[name] = left
        return found

    # -- nodes ----------------------------------------------------------------------------------

    def _result(self, node: fx.Node) -> Any:
        """What a node gives, or should give."""
        try:
            return self._node(node)
        except RefusalError:
            if node.name not in self.planned:
                raise
            self.refused.append(node)
            return self.planned[node.name]

    def _node(self, node: fx.Node) -> Any:
        if is_end(node):
            return None  # the walk has no gradients, and shapes no precision
        if node.op == "call_module" and (reason := self._whole(str(node.target))):
            args, kwargs = map_arg((node.args, node.kwargs), self.env.__getitem__)
            self._pin(self._shared(self.layers[str(node.target)]), reason)
            return self._leaf(self.layers[str(node.target)], args, kwargs, reason)
        if not self.labelled:
            return self._dry_run(node)
        self._catch_up(node)
        cropped = self.crops.dims(node)
        start, writes = self.system.mark(), dict(self.writes)
        wanted = set(wanted_elsewhere(self, node)) if self.with_facts else set()
        entered = self._entered(node, cropped, wanted)
        before = {n: self.value(t) for n, t in entered.items() if isinstance(t, Tensor)}
        out = self._call(node, entered)
        known = set(fixed(self, start, before))
        again = known | (set(lost(self, start, before, out)) if self.with_facts else set())
        if self.splits or self.unfit:
            again |= {n for n, value in before.items() if value.labels and n.op != "get_attr"}
        if again and (self.writes == writes or all(self._is_last_use(n, node) for n in again)):
            self.system.forget(start)
            self.writes = writes
            for n, value in before.items():
                entered[n].__dict__["demp"] = value
            for n in known & self.made:
                self._label(n, merge=True)
            entered = self._entered(node, cropped, again | wanted, known)
            out = self._call(node, entered)
        self.env[node] = out
        self._classify(node, entered)
        self._shapes(node)
        if self.writes != writes:
            self._close(node, start, writes)
        if node.name in self.observed and isinstance(out, Tensor) and out.dim() > 1:
            dim, seen = self.observed[node.name]
            value = self.value(out)
            value.known = seen.spread(out.dim(), dim).under(value.facts)
        return out

    def _catch_up(self, node: fx.Node) -> None:
        """Before a node runs: whether it is made of parameters alone, and what has happened to its
        inputs since they were made."""
        sources = self._sources(node)
        made = sources and all(n.op == "get_attr" or n in self.made for n in sources)
        if made or self._is_literal(node):
            self.made.add(node)
            self.lent[node] = self._lent(node)
        for n in node.all_input_nodes if called(node) not in SIZES else ():
            refresh(self, self.env[n], n.name)
        if self.reweighted and node.op == "call_module":
            for weight in self.layers[str(node.target)].parameters():
                refresh(self, weight)
        for n in sources if node not in self.made else ():
            if n in self.made:
                self._label(n)

    def _classify(self, node: fx.Node, entered: Mapping[fx.Node, Any]) -> None:
        """After it has run: whether blocks end behind it, what lies side by side in it, and whether
        it depends on inputs."""
        of_parts = any(n in self.exits and isinstance(self.env[n], (tuple, list)) for n in entered)
        if self.opens or of_parts:
            self.exits.add(node)
        if node in self.made and (self.joins or any(n in self.joined for n in self._sources(node))):
            self.joined.add(node)
        if node not in self.given:
            for t in tensors_of(self.env[node]):
                self.value(t).table = True

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """The inputs of a node that are tensors, or hold some."""
        return [n for n in node.all_input_nodes if tensors_of(self.env[n])]

    def _entered(
        self, node: fx.Node, cropped: set[int], again: Set[fx.Node] = frozenset(),
        known: Set[fx.Node] = frozenset(),
    ) -> dict[fx.Node, Any]:  # fmt: skip
        """What goes into a node, as it sees it: behind a cut where it runs `again`, or the size of
        an axis is `known`."""
        source: Any = node.args[0] if cropped else None
        labels = self.value(self.env[source]).labels if cropped else ()
        uncut = source if any(cropped & set(varying(x)) for x in labels) else None
        entered = {
            n: self.env[n] if n is uncut else self._enter(n, node, n in again, n in known)
            for n in node.all_input_nodes
        }
        if cropped:
            entered[source] = self.crops.whole(entered[source], cropped)
        return entered

    def _lent(self, node: fx.Node) -> set[int]:
        """The sizes of the input in what a node makes of parameters, or of numbers in the code."""
        found: set[int] = set()
        for n in node.all_input_nodes:
            found |= self.lent.get(n, found)
            value = self.env[n]
            if isinstance(value, (int, torch.Size)) and self.crops.varies(n):
                found.update([abs(value)] if isinstance(value, int) else value)  # or from behind
        return found

    def _shapes(self, node: fx.Node) -> None:
        """What a node does with the shape of its input: goes on with a chain, or makes blocks."""
        inputs = self._sources(node)
        picked = [n for n in inputs if n in self.given]  # by indices that are known
        others = len(picked) == 1 < len(inputs)
        if others and not any(map(repeats, self._labels(picked[0]))):
            inputs = picked
        if self.applied == self.moves and len(inputs) == 1:
            source, unfit = inputs[0], tuple(label for label, _ in self.unfit)
            flat = is_flat(self._labels(source))
            if source in self.chains.open or (flat and (self.splits or self.unfit)):
                if self.chains.extend(node, source, self._labels(node), unfit):
                    return
                if source in self.chains.open or self.splits:
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
        """What images and parts of constants have got since; and chains that are used on their way:
        their blocks stay equal."""
        for tensor in self.env.values():
            if isinstance(tensor, Tensor):
                catch_up(self, tensor)
        for node, broken in self.chains.settle(lambda user: called(user) in SIZES):
            self.site = Site(str(node.op), node.name, node.meta.get("source"))
            for label in broken:
                self.system.pin(label, "its channels are rearranged with another axis", self.site)
            for label in self._labels(node):
                self._blocks(label)

    def _output(self, node: fx.Node) -> None:
        """What the network returns keeps all of its channels. Those of a value that others read,
        too, are put back where they are known."""
        for n in node.all_input_nodes:
            refresh(self, self.env[n], n.name)
        for n in node.all_input_nodes:
            tensor = self.env[n]
            known = isinstance(tensor, Tensor) and len(n.users) > 1
            known = known and is_supplied(self.value(tensor))
            out = self._enter(n, node, spread=True) if known else tensor
            self._pin(out, "it is the network's output")


def _alike(one: Facts | None, other: Facts | None) -> bool:
    return one is other or (one is not None and other is not None and one.same_as(other))


def _coded(graph: fx.GraphModule) -> Iterator[nn.Module]:
    """Modules whose own code runs, and may write to what they hold."""
    return (m for m in graph.modules() if not type(m).__module__.startswith("torch."))

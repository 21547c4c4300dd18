"""The walk: run the fx graph on meta tensors, and let every ATen op say what it couples.

The graph that is rewritten is module-level fx; the graph that is understood is the stream of ATen
ops under it, each attributed to the fx node (and the user's line) that is running. Between the
nodes the walk leaves places where the graph may be cut.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import suppress
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from demp_fx.calls import LITERALS, called
from demp_fx.channels.blanks import catch_up
from demp_fx.channels.blocks import nested
from demp_fx.channels.chains import Chains, is_flat
from demp_fx.channels.circular import circular_in_parts
from demp_fx.channels.crops import Crops
from demp_fx.channels.custom import LayerOp
from demp_fx.channels.facts import Facts, agreed
from demp_fx.channels.labels import Labels, repeats, varying
from demp_fx.channels.layers import Layers
from demp_fx.channels.meta import as_meta, on_meta, placeholder, without_collection
from demp_fx.channels.places import SIZES, is_supplied
from demp_fx.channels.plain import call_of
from demp_fx.channels.running import Running
from demp_fx.channels.stream import Rule
from demp_fx.channels.system import Blocks, Site, System
from demp_fx.errors import DempError, UsageError
from demp_fx.inputs import Inputs
from demp_fx.shapes import Shape
from demp_fx.tracing.functions import Apply
from demp_fx.tracing.preserve import preserved
from demp_fx.tracing.regions import is_end
from demp_fx.trees import tensors_of


class RefusalError(UsageError):
    """A node does not take what it is given."""

    def __init__(self, node: fx.Node, message: str) -> None:
        super().__init__(message)
        self.node = node


class Walk(Layers):
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
        super().__init__(rule_of, shapes, with_facts, labelled)
        self.changing = changing
        self.graph, self.observed, self.planned = graph, observed, planned
        self.refused: list[fx.Node] = []
        self.chains = Chains(graph, self.env)
        self.crops = Crops(self)
        notes = graph.meta.get("demp_fx")
        self.opaque: set[str] = set(notes.opaque) if notes is not None else set()
        self.layers = dict(graph.named_modules(remove_duplicate=False))
        self.calls = Counter(
            str(n.target) for n in graph.graph.nodes
            if n.op == "call_module" and self.layers[str(n.target)]._parameters
        )  # fmt: skip

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

    def _number(self, node: fx.Node) -> Any:
        """What a node makes of sizes and numbers alone, which no rule has to see; else None."""
        if called(node) in SIZES:
            shape = node.target is not getattr or node.args[1] in ("shape", "ndim")
            source = node.args[0]
            if (
                not shape
                or not isinstance(source, fx.Node)
                or not isinstance(self.env[source], Tensor)
            ):
                return None
        elif getattr(node.target, "__module__", "") != "_operator" or not all(
            isinstance(self.env[n], (int, float, torch.Size)) for n in node.all_input_nodes
        ):
            return None
        args, kwargs = map_arg((node.args, node.kwargs), self.env.__getitem__)
        with suppress(Exception):  # it is run again, and refused with its place
            return self._target(node)(*args, **kwargs)
        return None

    def _node(self, node: fx.Node) -> Any:
        if is_end(node):
            return None  # the walk has no gradients, and shapes no precision
        if node.op == "call_module" and (reason := self._whole(str(node.target))):
            args, kwargs = map_arg((node.args, node.kwargs), self.env.__getitem__)
            return self._leaf(self.layers[str(node.target)], args, kwargs, reason)
        if not self.labelled:
            return self._dry_run(node)
        sources = [n for n in node.all_input_nodes if tensors_of(self.env[n])]
        made = sources and all(n.op == "get_attr" or n in self.made for n in sources)
        if made or self._is_literal(node):
            self.made.add(node)
            self.lent[node] = self._lent(node)
        for n in node.all_input_nodes if called(node) not in SIZES else ():
            self._refresh(n)
        if self.reweighted and node.op == "call_module":
            for weight in self.layers[str(node.target)].parameters():
                self._look_again(weight)
        for n in sources if node not in self.made else ():
            if n in self.made:
                self._label(n)
        cropped = self.crops.dims(node)
        start, writes = self.system.mark(), dict(self.writes)
        spread = self._of_several_calls(node)
        entered = self._entered(node, cropped, spread)
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
            for n in fixed & self.made:
                self._label(n, merge=True)
            entered = self._entered(node, cropped, again | spread, fixed)
            out = self._call(node, entered)
        self.env[node] = out
        of_parts = any(n in self.exits and isinstance(self.env[n], (tuple, list)) for n in entered)
        if self.opens or of_parts:
            self.exits.add(node)
        if node in self.made and (self.joins or any(n in self.joined for n in sources)):
            self.joined.add(node)
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

    def _of_several_calls(self, node: fx.Node) -> set[fx.Node]:
        """What goes into one of several calls of a layer, if some of it is known: other calls may
        want it, and it is put back for them."""
        if node.op != "call_module" or self.calls[str(node.target)] < 2 or not self.with_facts:
            return set()
        values = {n: self.env[n] for n in node.all_input_nodes}
        tensors = {n: self.value(t) for n, t in values.items() if isinstance(t, Tensor)}
        return {n for n, value in tensors.items() if is_supplied(value)}

    def _entered(
        self, node: fx.Node, cropped: set[int], again: Set[fx.Node] = frozenset(),
        fixed: Set[fx.Node] = frozenset(),
    ) -> dict[fx.Node, Any]:  # fmt: skip
        """What goes into a node, as it sees it."""
        source: Any = node.args[0] if cropped else None
        labels = self.value(self.env[source]).labels if cropped else ()
        uncut = source if any(cropped & set(varying(x)) for x in labels) else None
        entered = {
            n: self.env[n] if n is uncut else self._enter(n, node, n in again, n in fixed)
            for n in node.all_input_nodes
        }
        if cropped:
            entered[source] = self.crops.whole(entered[source], cropped)
        return entered

    def _is_literal(self, node: fx.Node) -> bool:
        """Whether a node makes a tensor of numbers in the code (on the device of an input, say)."""
        return called(node) in LITERALS and not any(
            isinstance(self.env[n], (Tensor, int, float)) for n in node.all_input_nodes
        )

    def _lent(self, node: fx.Node) -> set[int]:
        """The sizes of the input in what a node makes of parameters, or of numbers in the code."""
        found: set[int] = set()
        for n in node.all_input_nodes:
            found |= self.lent.get(n, found)
            value = self.env[n]
            if isinstance(value, (int, torch.Size)) and self.crops.varies(n):
                found.update([abs(value)] if isinstance(value, int) else value)  # or from behind
        return found

    def _dry_run(self, node: fx.Node) -> Any:
        """What a node gives where only shapes and multiplications are wanted."""
        if node.op == "call_module":
            args, kwargs = map_arg((node.args, node.kwargs), self.env.__getitem__)
            plain = call_of(self.layers[str(node.target)], args, kwargs)
            if plain is not None:
                self.system.macs += plain.macs
                return plain.out
        return self._call(node, {n: self.env[n] for n in node.all_input_nodes})

    def _shapes(self, node: fx.Node) -> None:
        """What a node does with the shape of its input: goes on with a chain, or makes blocks."""
        inputs = [n for n in node.all_input_nodes if tensors_of(self.env[n])]
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

    def _call(self, node: fx.Node, entered: Mapping[fx.Node, Any]) -> Any:
        args, kwargs = _writable(map_arg((node.args, node.kwargs), entered.__getitem__))
        if node.target is operator.getitem and isinstance(args[0], Tensor):
            args = (args[0], _as_tensors(args[1]))
        self.running = Running(
            node, entered, self.graph, self.layers, self.env, self.given, self.made, self.real
        )
        self.moves = self.applied = 0
        self.unfit, self.shaped = [], []
        self.splits = self.opens = self.joins = False
        if isinstance(node.target, Apply):
            return self.function(node.target, args, kwargs)
        layer = self.layers.get(str(node.target)) if node.op == "call_module" else None
        if layer is not None and LayerOp.takes(layer):
            return self._recurrent(layer, args, kwargs)
        start, run = self.system.mark(), self._target(node)
        plain = None if layer is None else call_of(layer, args, kwargs)
        try:
            if plain is not None:
                if plain.op is not None:
                    self.met(plain.op, plain.args, plain.kwargs, plain.out)
                return plain.out
            with self:
                if layer is not None:
                    return self._module(layer, args, kwargs)
                return run(*args, **kwargs)
        except DempError:
            raise
        except Exception as error:
            given = pytree.tree_leaves(list(entered.values()))
            self.system.forget(start)
            if any(isinstance(t, Tensor) and not t.is_meta for t in given):
                # the code made a tensor of its own: on meta, too
                return self._call(node, {n: as_meta(v) for n, v in entered.items()})
            if not isinstance(error, IndexError):  # zeros would be indices that are there
                with suppress(Exception):
                    out, reason = self._ran(run, args, kwargs), "it cannot be run on shapes alone"
                    self.abandon(start, reason)
                    self._pin((args, kwargs), reason)
                    return out
            where = f" ({self.site.source})" if self.site.source else ""
            shapes = [tuple(t.shape) for t in tensors_of(args)]
            what = "the example inputs do not run through the model"
            if self.picked:
                what = "how much a mask picks is not known without numbers; if that is all there is"
            raise RefusalError(
                node,
                f"{what}: node {node.name!r} "
                f"({node.target}){where} refuses inputs of shape {shapes}: {error}",
            ) from error

    def _target(self, node: fx.Node) -> Callable[..., Any]:
        """What a node calls."""
        if node.op == "call_method":
            return lambda x, *args, **kwargs: getattr(x, str(node.target))(*args, **kwargs)
        if node.target is getattr and node.args[1] == "data":
            return lambda x, _: x.detach()  # a view, which no mode would see
        run: Callable[..., Any] = node.target  # type: ignore[assignment]
        return self.layers[str(node.target)] if node.op == "call_module" else run

    def _whole(self, name: str) -> str:
        """Why a submodule is not looked into, if it is not."""
        return "it goes into a module that could not be traced" if name in self.opaque else ""

    def _output(self, node: fx.Node) -> None:
        """What the network returns keeps all of its channels. Those of a value that others read,
        too, are put back where they are known."""
        for n in node.all_input_nodes:
            self._refresh(n)
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


def _writable(tree: Any) -> Any:
    """Arguments as the code gets them: with lists and dicts of its own, those of a node being such
    that refuse to be written to. What only derives of these (an output by names, say) is itself."""
    kind = type(tree)
    if kind is tuple:
        return tuple(map(_writable, tree))
    if kind in (list, immutable_list):
        return list(map(_writable, tree))
    return {k: _writable(v) for k, v in tree.items()} if kind in (dict, immutable_dict) else tree


def _as_tensors(index: Any) -> Any:
    """An index with tensors in the places of lists: their numbers are then seen."""
    if isinstance(index, tuple):
        return tuple(_as_tensors(i) for i in index)
    return torch.tensor(index) if isinstance(index, list) else index

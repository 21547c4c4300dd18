"""Calls of the nodes of a graph on meta tensors."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from demp_fx.calls import LITERALS, SIZES, called
from demp_fx.channels.computed import numbers_in
from demp_fx.channels.custom import LayerOp
from demp_fx.channels.layers import Layers
from demp_fx.channels.meta import as_meta
from demp_fx.channels.plain import call_of
from demp_fx.channels.running import Running
from demp_fx.channels.stream import Rule
from demp_fx.errors import DempError, UsageError
from demp_fx.shapes import Shape
from demp_fx.tracing.autograd import Apply
from demp_fx.trees import tensors_of


class RefusalError(UsageError):
    """A node does not take what it is given."""

    def __init__(self, node: fx.Node, message: str) -> None:
        super().__init__(message)
        self.node = node


class Nodes(Layers):
    """A stream of ATen ops under the nodes of one graph, which are called one by one.

    `opaque`: the modules that are not looked into; `calls`: how often each layer is called that has
    parameters.
    """

    def __init__(
        self, graph: fx.GraphModule, rule_of: Callable[[torch._ops.OpOverload], Rule],
        shapes: Mapping[Any, Shape], with_facts: bool, labelled: bool,
    ) -> None:  # fmt: skip
        super().__init__(rule_of, shapes, with_facts, labelled)
        self.graph = graph
        notes = graph.meta.get("demp_fx")
        self.opaque: set[str] = set(notes.opaque) if notes is not None else set()
        self.layers = dict(graph.named_modules(remove_duplicate=False))
        self.calls = Counter(
            str(n.target) for n in graph.graph.nodes
            if n.op == "call_module" and self.layers[str(n.target)]._parameters
        )  # fmt: skip

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

    def _is_literal(self, node: fx.Node) -> bool:
        """Whether a node makes a tensor of numbers in the code (on the device of an input, say)."""
        return called(node) in LITERALS and not any(
            isinstance(self.env[n], (Tensor, int, float)) for n in node.all_input_nodes
        )

    def _dry_run(self, node: fx.Node) -> Any:
        """What a node gives where only shapes and multiplications are wanted."""
        if node.op == "call_module":
            args, kwargs = map_arg((node.args, node.kwargs), self.env.__getitem__)
            plain = call_of(self.layers[str(node.target)], args, kwargs)
            if plain is not None:
                self.system.macs += plain.macs
                return plain.out
        return self._call(node, {n: self.env[n] for n in node.all_input_nodes})

    def _call(self, node: fx.Node, entered: Mapping[fx.Node, Any]) -> Any:
        args, kwargs = _writable(map_arg((node.args, node.kwargs), entered.__getitem__))
        if node.target is operator.getitem and isinstance(args[0], Tensor):
            args = (args[0], _as_tensors(args[1]))
        self.running = Running(
            node, entered, self.graph, self.layers, self.env, self.given, self.made, self.lent,
            self.real,
        )  # fmt: skip
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
            with self.real():
                numbers = numbers_in(entered, self.graph, self.env)
            if numbers:
                return self._call(node, {**entered, **numbers})
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

    def _shared(self, module: nn.Module) -> list[Tensor]:
        """The tensors of a module that is not looked into which others read, too."""
        own = {id(t): t for t in (*module.parameters(), *module.buffers())}
        inside = set(module.modules())
        nodes = self.graph.graph.find_nodes(op="get_attr")
        read = [operator.attrgetter(str(n.target))(self.graph) for n in nodes]
        for m in self.layers.values():
            read += () if m in inside else (*m._parameters.values(), *m._buffers.values())
        return [own[id(t)] for t in read if id(t) in own]


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

"""Regions without gradients, in inference mode or under autocast, as nodes at their two ends.

A region is three nodes: torch's context is made, entered and left. They run in this order wherever
a graph is run node by node; in generated code they are a `with` block, which is left where
something raises, too.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import checkpoint

from demp_fx.tracing.values import UNKNOWN

if TYPE_CHECKING:
    from demp_fx.tracing.tracer import Tracer

# Contexts, and the arguments that make one like a given one.
_KINDS: dict[type, Callable[[Any], tuple[Any, ...]]] = {
    torch.no_grad: lambda _: (),
    torch.enable_grad: lambda _: (),
    torch.set_grad_enabled: lambda region: (region.mode,),
    torch.inference_mode: lambda region: (region.mode,),
    torch.autocast: lambda region: (
        region.device, region.fast_dtype, region._enabled, region._cache_enabled,
    ),
}  # fmt: skip
ENTER, EXIT = "__enter__", "__exit__"
_ENTERS = re.compile(rf"\w+ = (\w+)\.{ENTER}\(\)")
_EXITS = re.compile(rf"\w+ = \w+\.{EXIT}\(")


def enter(graph: fx.Graph, kind: type, args: tuple[Any, ...]) -> list[fx.Node]:
    """The nodes that begin a region, the context first."""
    context = graph.call_function(kind, args)
    return [context, graph.call_method(ENTER, (context,))]


def leave(graph: fx.Graph, context: fx.Node) -> fx.Node:
    """The node that ends a region."""
    return graph.call_method(EXIT, (context, None, None, None))


def is_end(node: fx.Node) -> bool:
    """Whether a node makes, enters or leaves a region."""
    return node.target in (ENTER, EXIT) or node.target in _KINDS


def regions_of(graph: fx.Graph) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """The regions that each node is in, by their contexts, the outermost first."""
    found: dict[fx.Node, tuple[fx.Node, ...]] = {}
    inside: tuple[fx.Node, ...] = ()
    for node in graph.nodes:
        if node.target == ENTER:
            inside = (*inside, node.args[0])
        elif node.target == EXIT:
            inside = inside[:-1]
        found[node] = inside
    return found


def drop_empty(graph: fx.Graph) -> None:
    """Take out regions in which nothing is left."""
    for node in reversed(graph.nodes):
        if node.target == ENTER and node.next.target == EXIT and node.next.args[0] is node.args[0]:
            context = node.args[0]
            assert isinstance(context, fx.Node)
            for part in (node.next, node, *([context] if len(context.users) == 2 else [])):
                graph.erase_node(part)


def as_blocks(body: list[str]) -> list[str]:
    """Generated code with the nodes of a region as a `with` block."""
    lines: list[str] = []
    depth = 0
    for line in "".join(body).split("\n"):
        if entered := _ENTERS.match(line):
            context = entered[1]
            made = re.match(rf" *{context} = ([^;]+)$", lines[-2])  # before this line's counter
            if made:
                context = made[1]
                del lines[-2]
            lines.append("    " * depth + f"with {context}:")
            depth += 1
        elif _EXITS.match(line):
            if lines[-2].lstrip().startswith("with "):
                lines.append("    " * depth + "pass")
            depth -= 1
        else:
            lines.append("    " * depth + line)
    return ["\n".join(lines)]


class _Recorder:
    """Makes the nodes of regions. `given`: the arguments of contexts that were made meanwhile;
    `open`: the nodes of those that have been entered."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer, self.nested = tracer, False
        self.given: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.open: defaultdict[Any, list[fx.Proxy]] = defaultdict(list)

    def patched(self, kind: type) -> dict[str, Any]:
        """What stands in for methods of one of the `_KINDS`."""
        make, begin, end = (vars(kind).get(n) for n in ("__init__", ENTER, EXIT))

        def init(region: Any, *args: Any, **kwargs: Any) -> None:
            if self._records():
                self.given[region] = args, kwargs
                if kind is torch.set_grad_enabled:  # which acts when it is made
                    self.open[region].append(self._context(kind, region))
            if not self._follows_a_proxy(region):
                self._run(make, region, *args, **kwargs)

        def start(region: Any) -> Any:
            if self._records():
                if not (kind is torch.set_grad_enabled and self.open[region]):
                    self.open[region].append(self._context(kind, region))
                self._node("call_method", ENTER, (self.open[region][-1],))
            return region if self._follows_a_proxy(region) else self._run(begin, region)

        def stop(region: Any, *error: Any) -> Any:
            if self.open[region] and self._records():
                self._node("call_method", EXIT, (self.open[region].pop(), None, None, None))
            return None if self._follows_a_proxy(region) else self._run(end, region, *error)

        made = {"__init__": init} if make is not None else {}
        return {**made, ENTER: start, EXIT: stop}

    def _records(self) -> bool:
        """Whether the model's own code is at work: not what runs on meta tensors, a context that
        makes use of another, or checkpointing, whose forward is run without gradients at first."""
        caller = sys._getframe(2).f_code.co_filename
        return not (self.tracer.values.busy or self.nested or caller == checkpoint.__file__)

    def _follows_a_proxy(self, region: Any) -> bool:
        """Whether the arguments are not known yet."""
        args, kwargs = self.given.get(region, ((), {}))
        return any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values()))

    def _context(self, kind: type, region: Any) -> fx.Proxy:
        args, kwargs = self.given.get(region) or (_KINDS[kind](region), {})
        return self._node("call_function", kind, args, kwargs)

    def _node(self, op: str, target: Any, args: Any, kwargs: Any = None) -> fx.Proxy:
        proxy: fx.Proxy = self.tracer.create_proxy(op, target, args, kwargs or {})
        self.tracer.values.env[proxy.node] = UNKNOWN  # not to be run on the way
        return proxy

    def _run(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        """Torch's own method: what Python asks for while it is traced is answered as in eager."""
        outer, self.nested = self.nested, True
        try:
            return method(*args, **kwargs)
        finally:
            self.nested = outer


@contextmanager
def regions_as_nodes(tracer: Tracer) -> Iterator[None]:
    """Meanwhile the regions that the model's code enters and leaves are nodes."""
    recorder = _Recorder(tracer)
    with ExitStack() as stack:
        for kind in _KINDS:
            for name, method in recorder.patched(kind).items():
                stack.callback(setattr, kind, name, vars(kind)[name])
                setattr(kind, name, method)
        yield


@contextmanager
def inference_as_no_grad() -> Iterator[None]:
    """Meanwhile inference mode only switches gradients off: torch.export knows no more of it."""
    kind: Any = torch.inference_mode
    begin = kind.__enter__

    def start(region: Any) -> None:
        gradients = torch.is_grad_enabled() and not region.mode
        region._inference_mode_context = torch.set_grad_enabled(gradients)

    kind.__enter__ = start  # its `__exit__` leaves that context
    try:
        yield
    finally:
        kind.__enter__ = begin

"""The walk: run the fx graph on meta tensors, and let every ATen op say what it couples.

The graph that is rewritten is module-level fx; the graph that is understood is the stream of ATen
ops under it, each attributed to the fx node (and the user's line) that is running.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from demp_fx.channels.facts import Facts
from demp_fx.channels.labels import Labels, along, varying
from demp_fx.channels.system import Axis, Edge, Site, System, Traffic
from demp_fx.errors import DempError, UsageError
from demp_fx.inputs import Inputs

STRUCTURE = ""  # the reason of a pin that is no news to anyone: kernel sizes, unused dims
SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
SIZES = {getattr, "size", "dim", "numel", "ndimension"}


class RefusalError(UsageError):
    """A node does not take what it is given."""

    def __init__(self, node: fx.Node, message: str) -> None:
        super().__init__(message)
        self.node = node


@dataclass(slots=True)
class Value:
    """What the walk knows of one tensor.

    `data`: for a parameter, buffer or a view of one, the real tensor behind it. `vector`: its facts
    are its numbers, read when they are asked for.
    """

    labels: Labels = ()
    known: Facts | None = None
    data: Tensor | None = None
    version: int = 0
    vector: bool = False

    @property
    def facts(self) -> Facts | None:
        if self.vector and self.known is None and self.data is not None:
            self.known = Facts.exactly(self.data)
        return self.known


@dataclass(slots=True)
class Call:
    """One ATen op as it was called, and what it returned."""

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    site: Site

    def arg(self, name: str) -> Any:
        """An argument by its name in the op's schema, or its default; None where it has none."""
        position, default = _arguments(self.op).get(name, (len(self.args), None))
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, in order."""
        found = []
        for a in (*self.args, *self.kwargs.values()):
            if isinstance(a, Tensor):
                found.append(a)
            elif isinstance(a, (list, tuple)):
                found.extend(t for t in a if isinstance(t, Tensor))
        return found

    @property
    def outputs(self) -> list[Tensor]:
        if isinstance(self.out, Tensor):
            return [self.out]
        return [t for t in pytree.tree_leaves(self.out) if isinstance(t, Tensor)]


@functools.cache
def _arguments(op: torch._ops.OpOverload) -> dict[str, tuple[int, Any]]:
    return {a.name: (k, a.default_value) for k, a in enumerate(op._schema.arguments)}


Rule = Callable[["Walk", Call], None]
Shape = Callable[[tuple[Any, ...]], Any]


@dataclass
class Walk(TorchDispatchMode):
    """Interpret `graph` on meta tensors, recording constraints in `system`.

    `rules` maps ATen ops to rules, `shapes` to shortcuts past slow meta kernels. `observed`: what
    calibration saw at the output of a node, by its name: a dim, and facts along it.
    """

    graph: fx.GraphModule
    rule_of: Callable[[torch._ops.OpOverload], Rule]
    shapes: Mapping[Any, Shape]
    observed: Mapping[str, tuple[int, Facts]] = field(default_factory=dict)
    with_facts: bool = True
    system: System = field(default_factory=System)
    env: dict[fx.Node, Any] = field(default_factory=dict)
    params: dict[str, Value] = field(default_factory=dict)
    activations: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.site = Site("", "")
        self.versions: dict[int, int] = {}
        self.names: dict[int, tuple[str, Tensor]] = {}
        self.quiet = False
        self.real: Callable[[], AbstractContextManager[None]] = nullcontext
        self.profiles = 0
        notes = self.graph.meta.get("demp_fx")
        self.opaque: set[str] = set(notes.opaque) if notes is not None else set()

    # -- the fx graph ---------------------------------------------------------------------------

    def run(self, inputs: Inputs) -> System:
        """Walk the whole graph on example `inputs`.

        Raises `UsageError` where the inputs do not fit, naming the node and the user's line.
        """
        example = inputs.map(lambda t: torch.empty_like(t, device="meta"))
        feed = iter(example.args)
        with torch.no_grad(), on_meta(self.graph) as twins:
            self.names, self.real = twins
            for node in self.graph.graph.nodes:
                self.site = Site(str(node.op), node.name, node.meta.get("source"))
                if node.op == "placeholder":
                    self.env[node] = _placeholder(node, feed, example.kwargs)
                elif node.op == "output":
                    self._output(node)
                else:
                    self.env[node] = self._node(node)
        self.system.close()
        return self.system

    def _node(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.graph)
        if node.op == "call_module" and str(node.target) in self.opaque:
            args, kwargs = map_arg((node.args, node.kwargs), self.env.__getitem__)
            return self._leaf(self.graph.get_submodule(str(node.target)), args, kwargs)
        entered = {n: self._enter(n, node) for n in node.all_input_nodes}
        args, kwargs = map_arg((node.args, node.kwargs), entered.__getitem__)
        try:
            with self:
                if node.op == "call_module":
                    out = self.graph.get_submodule(str(node.target))(*args, **kwargs)
                elif node.op == "call_method":
                    out = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                else:
                    out = node.target(*args, **kwargs)  # type: ignore[operator]
        except DempError:
            raise
        except Exception as error:
            where = f" ({self.site.source})" if self.site.source else ""
            shapes = [tuple(t.shape) for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
            raise RefusalError(
                node,
                f"the example inputs do not run through the model: node {node.name!r} "
                f"({node.target}){where} refuses inputs of shape {shapes}: {error}",
            ) from error
        if node.name in self.observed and isinstance(out, Tensor) and out.dim() > 1:
            dim, seen = self.observed[node.name]
            value = self.value(out)
            value.known = seen.spread(out.dim(), dim).under(value.facts)
        return out

    def _leaf(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A submodule that could not be traced: whatever goes into it stays as it is."""
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                for label in self.value(leaf).labels:
                    self.system.pin(
                        label, "it goes into a module that could not be traced", self.site
                    )
        try:
            return module(*args, **kwargs)
        except Exception:
            with self.real():
                return _on_zeros(module, args, kwargs)

    def _output(self, node: fx.Node) -> None:
        for n in node.all_input_nodes:
            for leaf in pytree.tree_leaves(self.env[n]):
                if isinstance(leaf, Tensor):
                    for label in self.value(leaf).labels:
                        self.system.pin(label, "it is the network's output", self.site)

    def _enter(self, n: fx.Node, user: fx.Node) -> Any:
        """The value of `n` as `user` sees it: behind fresh atoms where the graph may be cut."""
        tensor = self.env[n]
        if not isinstance(tensor, Tensor) or n.op == "get_attr" or user.target in SIZES:
            return tensor
        value = self.value(tensor)
        if not value.labels:
            return tensor
        if value.version != self._version(tensor):
            self._stale(n, value)
            return tensor
        total = self._is_sum(user)
        if not total and len(n.users) < 2:
            return tensor
        return self._cut(n, user, tensor, value, total)

    def _cut(self, n: fx.Node, user: fx.Node, tensor: Tensor, value: Value, total: bool) -> Tensor:
        rank = tensor.dim()
        labels, cut = [], False
        for label in value.labels:
            dims = varying(label)
            if len(dims) == 1 and label.numel() == tensor.size(dims[0]):
                d, size = dims[0], label.numel()
                axis = self.system.fresh(f"{n.name}->{user.name}", -1, size)
                facts = value.facts.along(d, size) if value.facts is not None else None
                self.system.flow.append(
                    Edge(n.name, user.name, d, label.reshape(-1), axis.atoms, facts, total,
                         tensor.numel() // size, self.site)
                )  # fmt: skip
                label, cut = along(axis.atoms, rank, d), True
            labels.append(label)
        if not cut:
            return tensor
        with self.silently():
            alias = tensor.detach()
        alias.__dict__["demp"] = Value(tuple(labels), value.facts, None, value.version)
        return alias

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
        if node.target in (operator.iadd, "add_") and len(a.users) > 1:
            return False
        if x.shape != y.shape or x.dtype != y.dtype:
            return False
        p, q = self.value(x).labels, self.value(y).labels
        return len(p) == len(q) == 1 and varying(p[0]) == varying(q[0]) and len(varying(p[0])) == 1

    def _stale(self, n: fx.Node, value: Value) -> None:
        """`n` was changed in place through another name: nothing about it can be relied on."""
        reason = "it is changed in place while others read it"
        for edge in self.system.edges:
            if edge.producer == n.name:
                self.system.pin(edge.target, reason, self.site)
        for label in value.labels:
            self.system.pin(label, reason, self.site)
        value.known = None

    # -- the ATen ops ---------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        shape = self.shapes.get(func)
        try:
            out = func(*args, **kwargs) if shape is None else shape(args)
        except NotImplementedError:
            out = _on_zeros(func, args, kwargs)
        except RuntimeError:  # a tensor that the model's code made of its own
            args, kwargs = _meta((args, kwargs))
            out = func(*args, **kwargs)
        if self.quiet:
            return out
        site = Site(str(func), self.site.node, self.site.source)
        call = Call(func, args, kwargs, out, site)
        if torch.Tag.inplace in func.tags:
            storage = args[0].untyped_storage()._cdata
            self.versions[storage] = self.versions.get(storage, 0) + 1
        for tensor in call.tensors:
            value = self.value(tensor)
            if value.labels or value.known is not None:
                self._apply(call)
                break
        return out

    def _apply(self, call: Call) -> None:
        try:
            self.rule_of(call.op)(self, call)
        except Exception as error:
            where = f"node {call.site.node!r} ({call.site.source})"
            raise DempError(f"the rule of {call.op} failed at {where}: {error!r}") from error

    @contextmanager
    def silently(self) -> Iterator[None]:
        """Run ops that are the walk's own, not the network's."""
        before, self.quiet = self.quiet, True
        try:
            yield
        finally:
            self.quiet = before

    # -- what rules use -------------------------------------------------------------------------

    def value(self, tensor: Tensor) -> Value:
        """What is known of a tensor; a parameter gets its atoms when it is first met."""
        value = tensor.__dict__.get("demp")
        if value is None:
            value = Value(version=self._version(tensor))
            known = self.names.get(id(tensor))
            if known is not None:
                value = self._parameter(tensor, *known)
            tensor.__dict__["demp"] = value
        return value

    def _parameter(self, tensor: Tensor, name: str, real: Tensor) -> Value:
        rank = tensor.dim()
        labels = tuple(
            along(self.system.fresh(name, d, n).atoms, rank, d)
            for d, n in enumerate(tensor.shape)
            if n > 1
        )
        vector = self.with_facts and rank == 1 and real.is_floating_point() and not real.is_meta
        value = self.params[name] = Value(labels, None, real.detach(), 0, vector)
        return value

    def give(
        self, out: Tensor, labels: Labels, facts: Facts | None = None, data: Tensor | None = None,
        moved: bool = False,
    ) -> None:  # fmt: skip
        """Set what is known of an op's result; `moved`: it is a view, and writes nothing."""
        out.__dict__["demp"] = Value(labels, facts, data, self._version(out))
        if not moved and data is None:
            for label in labels:
                if label.numel() and len(varying(label)) == 1:
                    elements = out.numel() // label.numel()
                    self.system.traffic.append(Traffic(label.reshape(-1), elements))

    def pin(self, call: Call, label: Tensor, reason: str) -> None:
        """Keep the atoms of a label, because of this call."""
        self.system.pin(label, reason, call.site)

    def profile(self) -> int:
        """The number of a new spatial map."""
        self.profiles += 1
        return self.profiles

    def axis_of(self, label: Tensor) -> Axis | None:
        """The axis whose atoms a label carries, all of them in order, if there is one."""
        flat = label.reshape(-1)
        if flat.numel() == 0:
            return None
        axes = self.system.axes
        first, lo, hi = int(flat[0]), 0, len(axes)
        while lo < hi:
            mid = (lo + hi) // 2
            lo, hi = (mid + 1, hi) if axes[mid].stop <= first else (lo, mid)
        if lo == len(axes) or axes[lo].start != first or axes[lo].size != flat.numel():
            return None
        return axes[lo] if torch.equal(flat, axes[lo].atoms) else None

    def _version(self, tensor: Tensor) -> int:
        return self.versions.get(tensor.untyped_storage()._cdata, 0) if self.versions else 0


def _on_zeros(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The shapes of a result that has no meta kernel: run for real, on zeros."""
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda t: torch.zeros_like(t, device="cpu") if t.is_meta else t, (args, kwargs)
    )
    return _meta(function(*args, **kwargs))


def _meta(value: Any) -> Any:
    return pytree.tree_map_only(
        Tensor, lambda t: t if t.is_meta else torch.empty_like(t, device="meta"), value
    )


def _placeholder(node: fx.Node, feed: Iterator[Any], kwargs: dict[str, Any]) -> Any:
    if str(node.target) in kwargs:
        return kwargs[str(node.target)]
    try:
        return next(feed)
    except StopIteration:
        if node.args:
            return node.args[0]
        raise UsageError(f"the example inputs have no value for {node.target!r}") from None


Twins = tuple[dict[int, tuple[str, Tensor]], Callable[[], AbstractContextManager[None]]]


@contextmanager
def on_meta(graph: fx.GraphModule) -> Iterator[Twins]:
    """Swap every parameter and buffer for a meta twin, and all modules to eval mode, meanwhile.

    Yields id(twin) -> (name, real tensor), and a context in which the real ones are back. Twins of
    tied tensors are one, under the first name.
    """
    twins: dict[int, Tensor] = {}
    names: dict[int, tuple[str, Tensor]] = {}
    modules = list(graph.named_modules())
    saved = [(m, dict(m._parameters), dict(m._buffers), m.training) for _, m in modules]

    def restore() -> None:
        for module, parameters, buffers, _ in saved:
            module._parameters.update(parameters)
            module._buffers.update(buffers)

    def swap() -> None:
        for prefix, module in modules:
            _swap(prefix, module, twins, names)

    @contextmanager
    def real() -> Iterator[None]:
        restore()
        try:
            yield
        finally:
            swap()

    try:
        swap()
        for _, module in modules:
            module.training = False
        yield names, real
    finally:
        restore()
        for module, _, _, training in saved:
            module.training = training


def _swap(
    prefix: str,
    module: nn.Module,
    twins: dict[int, Tensor],
    names: dict[int, tuple[str, Tensor]],
) -> None:
    for table in (module._parameters, module._buffers):
        for key, real in table.items():
            if real is None:
                continue
            twin = twins.get(id(real))
            if twin is None:
                twin = torch.empty_strided(
                    real.shape, real.stride(), dtype=real.dtype, device="meta"
                )
                twins[id(real)] = twin
                names[id(twin)] = (f"{prefix}.{key}" if prefix else key, real)
            table[key] = twin  # type: ignore[assignment]

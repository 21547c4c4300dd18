"""The symbolic tracer behind `demp_fx.trace`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
import operator
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.proxy import Attribute
from torch.utils import _pytree as pytree

from demp_fx.expressions import expression_of
from demp_fx.tracing.arguments import FILLED, filled, in_place, spelled_out
from demp_fx.tracing.assigned import items_as_nodes, keep_assigned
from demp_fx.tracing.augmented import keep_in_place, writes
from demp_fx.tracing.autograd import as_nodes
from demp_fx.tracing.checks import is_checked
from demp_fx.tracing.functions import (
    ATEN,
    aten_as_nodes,
    attention_in_parts,
    batch_norms_as_nodes,
    checks_of_proxies,
    distributions_of_proxies,
    kinds_of_devices,
    methods_as_nodes,
    scripts_as_python,
    variables_of_proxies,
)
from demp_fx.tracing.kinds import proxies_are_tensors
from demp_fx.tracing.mapped import vmap_of_proxies
from demp_fx.tracing.memo import is_made_anew
from demp_fx.tracing.modes import kept_modes
from demp_fx.tracing.module import left_out
from demp_fx.tracing.preserve import preserved
from demp_fx.tracing.proxies import Flag, KnownProxy, TensorProxy
from demp_fx.tracing.regions import drop_empty, regions_as_nodes
from demp_fx.tracing.sizes import sizes_stay
from demp_fx.tracing.source import failed_at, first_line, user_line, users_frame
from demp_fx.tracing.states import (
    attributes,
    changed_attributes,
    kept_memory,
    memory_of,
    written_among,
    written_attributes,
)
from demp_fx.tracing.submodules import (
    Submodules,
    any_keyword,
    hears_gradients,
    is_hooked,
    uncompiled,
)
from demp_fx.tracing.unused import drop_unused
from demp_fx.tracing.values import (
    NUMBERS,
    Values,
    named_state,
    needs_numbers,
    on_meta,
    set_modes,
)
from demp_fx.tracing.written import Written, as_written, give_back

# What gives a tensor itself another shape: all that has it sees the result from then on.
_SHAPED_IN_PLACE = {"unsqueeze_", "squeeze_", "transpose_", "swapaxes_", "swapdims_", "t_"}
# Packages whose functions want sizes as plain numbers: these stay calls, and look at any size anew.
PLAIN_SIZES = ("einx",)
# What takes an item out of a tuple, list or dict.
_ITEMS = {operator.getitem, "get", "pop"}
# Types of Python that torch takes for those of tensors.
_KINDS = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}
# Arguments of these types are in the graph as they are.
_LITERALS = {type(None), bool, int, float, str, torch.dtype}


class Tracer(Submodules):
    """Traces one module once.

    Args:
        bound: the example inputs as arguments of the root's forward.
        forking: see `Submodules`.
        states: buffers that are attributes else, by name, as the forward changes them.
        remembers: what is kept for inputs of the same sizes may be used.

    Attributes:
        plain: the tensors that modules have as attributes, and not as buffers, by name.
        changed: the names of those that the forward has changed.
    """

    proxy_buffer_attributes = True

    def __init__(
        self, bound: inspect.BoundArguments, forking: bool = False, states: Set[str] = frozenset(),
        remembers: bool = False,
    ) -> None:  # fmt: skip
        called: Any = (math, *filter(None, map(sys.modules.get, PLAIN_SIZES)))
        super().__init__(called, forking)
        self._autowrap_function_ids |= ATEN  # under names of the user's own
        self.bound, self.states = bound, states
        self.memos = None if remembers else set()
        self.changed: set[str] = set()
        self.tensor_proxies: dict[str, TensorProxy] = {}
        self.lent: list[weakref.ref[fx.Proxy]] = []
        self.reshaped: list[tuple[fx.Proxy, fx.Node]] = []
        self.augmented: list[fx.Node] = []
        self.written: list[Written] = []
        self.returned: dict[int, str] = {}  # by its id, the place in the output

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of `root`, a module, without what only decided control flow."""
        self.names: dict[int, str] = {}
        self.plain: dict[str, Tensor] = {}
        self.state = dict(named_state(root))
        for name, tensor in self.state.items():
            self.names.setdefault(id(tensor), name)
        self.memory = kept_memory(root)
        modules = list(root.named_modules())
        self.kept = kept_modes(root)
        self.modes = {m: self.kept.get(m, m.training) for _, m in modules}
        self.held = {m: {**m._parameters, **m._buffers} for _, m in modules}
        self.flags = {m: Flag(self, f"{n}.training".lstrip(".")) for n, m in modules}
        with (
            preserved(root.modules()), as_nodes(self), aten_as_nodes(self), attention_in_parts(),
            batch_norms_as_nodes(self), checks_of_proxies(), distributions_of_proxies(),
            variables_of_proxies(), regions_as_nodes(self), sizes_stay(root), scripts_as_python(),
            items_as_nodes(self), kinds_of_devices(self), vmap_of_proxies(self),
            methods_as_nodes(),
        ):  # fmt: skip
            set_modes({**self.flags, **self.kept})
            if hears_gradients(root):
                self.baked["backward hooks of the model itself left out"] = None
                vars(root).update(_backward_hooks={}, _backward_pre_hooks={})
            before = attributes(root)
            try:
                graph = super().trace(root, concrete_args)
                if changing := written_among(graph, self.values.asked):
                    raise TypeError(f"{changing} is asked for, and changed")
                keep_in_place(graph, self.augmented, self.values.of_node)
                self.changed = written_attributes(graph, root, before)
            finally:
                self._take_back()
                self.changed |= changed_attributes(before, root)
        graph._tracer_cls = None
        drop_unused(graph, self.checks)
        drop_empty(graph)
        return graph

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        self.plain = {name: t for t, name in self.tensor_attrs.items() if isinstance(t, Tensor)}
        state = {**self.state, **self.plain}
        self.values = Values(self.root, self.graph, self.modes, self.flags, state)
        code = inspect.unwrap(root_fn).__code__
        self.entry = f"{code.co_filename}:{code.co_firstlineno}"
        arguments = self.bound.arguments
        for name, value in arguments.items():
            kind = self.bound.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                many = enumerate(value)
                arguments[name] = tuple(self._placeholder(f"{name}_{i}", v) for i, v in many)
            elif kind is inspect.Parameter.VAR_KEYWORD:
                arguments[name] = {key: self._placeholder(key, v) for key, v in value.items()}
            else:
                arguments[name] = self._placeholder(name, value)
        expression = None if is_hooked(self.root) else expression_of(self.root)
        # _call_impl, not forward: it runs the root's hooks, and a forward set on the instance.
        written = uncompiled(self.root, self.root._call_impl)
        call = functools.partial(expression, self.root) if expression else written

        def run():  # type: ignore[no-untyped-def]  # fx would take an annotation for the output's
            return self._run(call)

        return run, []

    def _run(self, forward: Callable[..., Any]) -> Any:
        with proxies_are_tensors(), any_keyword():
            result = forward(*self.bound.args, **self.bound.kwargs)
        if not all(map(is_made_anew, self.memos or ())):
            raise TypeError("sizes that it compares are none of the last call")
        keep_assigned(self)
        leaves, _ = pytree.tree_flatten_with_path(result)
        self.returned = {id(leaf): pytree.keystr(path) for path, leaf in leaves}
        return result

    def _placeholder(self, name: str, value: Any) -> Any:
        """A proxy for an argument with tensors in it; any other is an argument without effect."""
        proxy = self.create_proxy("placeholder", name, (), {})
        self.values.env[proxy.node] = on_meta(value)
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            return proxy
        self.baked[f"argument `{name}` fixed at {value!r}"] = None
        return value

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **named: Any
    ) -> Any:
        if target in _SHAPED_IN_PLACE and type(args[0]) is KnownProxy:
            shaped = self.create_proxy(kind, target.removesuffix("_"), args, kwargs)
            self.reshaped.append((args[0], args[0].node))
            args[0].node = shaped.node
            return args[0]
        if args and issubclass(type(args[0]), Tensor) and writes(kind, target):
            args = (self._written(args[0]), *args[1:])
        if issubclass(type(kwargs.get("out")), Tensor):
            kwargs = {**kwargs, "out": self._written(kwargs["out"])}
        if target is operator.pow and type(args[0]) in (int, float) and args[0] < 0:
            target = pow  # the code would read `-1 ** x`, and Python that as `-(1 ** x)`
        if target in FILLED and (parts := filled(target, args, kwargs, self.values)):
            number, args, kwargs = parts
            made = self.create_proxy(kind, FILLED[target][1], args, kwargs)
            return made.fill_(number.detach())
        target, args = spelled_out(target, args, self.values)
        if kwargs and not args and kind in ("call_function", "call_module"):
            layer = kind == "call_module"
            runs = type(self.root.get_submodule(target)).forward if layer else target
            args, kwargs = in_place(runs, kwargs)
        name = getattr(target, "__name__", target)
        if name in NUMBERS and needs_numbers(name, args, kwargs, self.values):
            frame = users_frame(sys._getframe())
            if frame is None or not is_checked(frame):
                raise TypeError(f"{name} needs the numbers in a tensor")
        if target is torch._assert and self.values.of(args[0]) is True:
            return args[0]  # holds for these sizes, and need not for narrower ones
        if kind == "call_function" and _is_wrapped(target):
            mark = len(self.graph.nodes)
            try:
                result = target(*args, **kwargs)
                if isinstance(result, fx.Proxy):
                    return result
                if isinstance(result, (tuple, list)):
                    return _markable(result)
                reason = f"returns a {type(result).__name__} at {user_line(sys._getframe())}"
            except Exception as error:
                reason = f"{first_line(error)} at {failed_at(error)}"
            self._roll_back(mark)
            self.opaque[f"{target.__module__}.{target.__qualname__}"] = reason
        made = super().create_proxy(kind, target, args, kwargs, *more, **named)
        if target in _ITEMS and self._is_none(made.node):
            return None  # the code will ask whether it is
        return made

    def _is_none(self, item: fx.Node) -> bool:
        """Whether an item of an input is None, which it is taken to stay: it says what there is,
        not how large."""
        source: Any = item
        while isinstance(source, fx.Node) and source.target in _ITEMS and source.args:
            source = source.args[0]
        given = isinstance(source, fx.Node) and source.op == "placeholder"
        return given and self.values.of_node(item) is None

    def _written(self, tensor: Tensor) -> Tensor:
        """A tensor that is written into: if the code has made it, it is a value from now on."""
        if isinstance(tensor, Written) or memory_of(tensor) in self.memory:
            return tensor
        self.written.append(as_written(tensor, self))
        return self.written[-1]

    def _roll_back(self, mark: int) -> None:
        nodes = self.graph.nodes
        for node in list(itertools.islice(reversed(nodes), len(nodes) - mark)):
            self.graph.erase_node(node)
        lost = [tensor for tensor in self.written if tensor.proxy.node._erased]
        self.written = [tensor for tensor in self.written if not tensor.proxy.node._erased]
        give_back(lost)
        while self.reshaped and self.reshaped[-1][0].node._erased:
            proxy, node = self.reshaped.pop()
            proxy.node = node

    def create_node(
        self,
        kind: str,
        target: Any,
        args: Any,
        kwargs: Any,
        name: Any = None,
        type_expr: Any = None,
    ) -> fx.Node:
        node = self.graph.create_node(kind, target, None, None, name, type_expr)
        if args:  # set here: `Graph.create_node` would search them for sizes of torch.export
            node.args = args
        if kwargs:
            node.kwargs = kwargs
        ends = bool(self.returned) or kind in ("placeholder", "output")
        node.meta["source"] = self.entry if ends else user_line(sys._getframe())
        path = call = ""
        if self.module_stack:
            call = next(reversed(self.module_stack))
            path = self.module_stack[call][0]
            node.meta["nn_module_stack"] = self.module_stack
        node.meta["module"] = (path, call)
        return node

    def create_arg(self, a: Any) -> Any:
        kind = type(a)
        if kind in _LITERALS:
            return a
        if kind is type and a in _KINDS:  # `torch.ones(4, dtype=bool)`
            return _KINDS[a]
        if isinstance(a, np.generic):  # numpy's numbers are written in a way that needs its name
            return a.item()
        if isinstance(a, np.ndarray):
            return self.create_arg(torch.from_numpy(a.copy()))
        if kind is tuple or kind is list:
            return kind([self.create_arg(item) for item in a])
        if kind is dict and not a:
            return a
        if isinstance(a, fx.Proxy):
            if isinstance(a, Attribute) and a._node is not None and a._node._erased:
                a._node = None  # it was made by an attempt that was rolled back
            return a.node
        if isinstance(a, Tensor):
            if isinstance(a, Written):
                return a.proxy.node
            if id(a) in self.names:
                return self.create_node("get_attr", self.names[id(a)], (), {})
            if a.grad_fn is not None:
                raise TypeError("a tensor computed from parameters in a way that cannot be traced")
        if dataclasses.is_dataclass(kind):  # what transformers return is a dictionary as well
            named = {f.name: getattr(a, f.name) for f in dataclasses.fields(kind) if f.init}
            return self.create_node("call_function", kind, (), self.create_arg(named))
        if kind is OrderedDict:
            return self.create_node("call_function", kind, (self.create_arg(dict(a)),), {})
        try:
            return super().create_arg(a)
        except NotImplementedError:
            if not self.returned.get(id(a)):  # nothing else may be the output as a whole
                raise
        self.baked[left_out(self.returned[id(a)], a)] = None
        return None

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        name = self.names.get(id(attr_val))
        if name is None or self.values.busy:
            return attr_val
        proxy = self.tensor_proxies.get(name)
        if proxy is None or proxy.node._erased:
            node = self.create_node("get_attr", name, (), {})
            proxy = self.tensor_proxies[name] = TensorProxy(node, self, attr_val)
        return proxy

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return self.lend(KnownProxy(node, self))

    def lend(self, proxy: fx.Proxy) -> fx.Proxy:
        """`proxy`, which the model's code gets for as long as it is traced."""
        self.lent.append(weakref.ref(proxy))
        return proxy

    def _take_back(self) -> None:
        """Code may keep proxies for good, as keys of a cache of its own (einops does): they then do
        not keep the model."""
        give_back(self.written)
        for reference in self.lent:
            if (proxy := reference()) is not None:
                vars(proxy).clear()


def _is_wrapped(target: Any) -> bool:
    """Whether a function came here by torch.fx.wrap, to be looked into."""
    package = getattr(target, "__module__", "").partition(".")[0]
    return isinstance(target, types.FunctionType) and package not in ("torch", *PLAIN_SIZES)


def _markable(result: Any) -> Any:
    """A list or tuple that a wrapped function returns, with the `node` that fx marks on it."""
    kind = type(result)
    marked = type(kind.__name__, (kind,), {"node": types.SimpleNamespace(meta={})})
    return marked(*result) if hasattr(result, "_fields") else marked(result)

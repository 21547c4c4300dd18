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
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute
from torch.utils import _pytree as pytree

from demp_fx.expressions import Expression, batch_norm, expression_of
from demp_fx.tracing.arguments import in_place, signature_of, spelled_out
from demp_fx.tracing.assigned import items_as_nodes, keep_assigned
from demp_fx.tracing.augmented import keep_in_place
from demp_fx.tracing.computed import computes_weight
from demp_fx.tracing.decisions import Decisions
from demp_fx.tracing.functions import (
    ATEN,
    as_nodes,
    aten_as_nodes,
    batch_norms_as_nodes,
    checks_of_proxies,
    distributions_of_proxies,
    scripts_as_python,
    variables_of_proxies,
)
from demp_fx.tracing.kinds import proxies_are_tensors
from demp_fx.tracing.norms import PLAIN, plain_kind
from demp_fx.tracing.preserve import preserved
from demp_fx.tracing.proxies import Flag, KnownProxy, TensorProxy
from demp_fx.tracing.regions import drop_empty, regions_as_nodes
from demp_fx.tracing.sizes import sizes_stay
from demp_fx.tracing.source import failed_at, first_line, user_line
from demp_fx.tracing.states import attributes, changed_attributes, written_attributes
from demp_fx.tracing.values import (
    NUMBERS,
    Values,
    named_state,
    needs_numbers,
    on_meta,
    set_modes,
)

# Without a user these leave no trace: the rest of control flow that has been decided.
_PURE: set[Any] = {getattr, operator.getitem, operator.not_, operator.and_, operator.or_}
_PURE |= {operator.eq, operator.ne, operator.lt, operator.gt, operator.le, operator.ge}
_PURE |= {operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod}
# Nor does what only moves numbers that nobody reads: it may tell of sizes that happen to be alike.
_PURE |= {"reshape", "view", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "expand"}
# What gives a tensor itself another shape: all that has it sees the result from then on.
_SHAPED_IN_PLACE = {"unsqueeze_", "squeeze_", "transpose_", "swapaxes_", "swapdims_", "t_"}
# Packages whose functions want sizes as plain numbers: these stay calls, and look at any size anew.
PLAIN_SIZES = ("einx",)
# Arguments of these types are in the graph as they are.
_LITERALS = {type(None), bool, int, float, str, torch.dtype}


class Tracer(Decisions):
    """Traces one module once.

    Args:
        bound: the example inputs as arguments of the root's forward.
        forking: leave modules whole that have no state and ask for the mode: a graph has one way.
        states: buffers that are attributes else, by name, as the forward changes them.

    Attributes:
        opaque: see `TraceNotes`.
        chosen: the modules in `opaque` that are meant to be left whole.
        forks: the modules that were left whole for this.
        plain: the tensors that modules have as attributes, and not as buffers, by name.
        changed: the names of those that the forward has changed.
    """

    proxy_buffer_attributes = True

    def __init__(
        self, bound: inspect.BoundArguments, forking: bool = False, states: Set[str] = frozenset()
    ) -> None:
        called: Any = (math, *filter(None, map(sys.modules.get, PLAIN_SIZES)))
        super().__init__(called)
        self._autowrap_function_ids |= ATEN  # under names of the user's own
        self.bound, self.forking, self.states = bound, forking, states
        self.changed: set[str] = set()
        self.opaque: dict[str, str] = {}
        self.chosen: set[str] = set()
        self.forks: set[str] = set()
        self.tensor_proxies: dict[str, TensorProxy] = {}
        self.expressions: dict[type[nn.Module], Expression | None] = {}
        self.lent: list[weakref.ref[fx.Proxy]] = []
        self.reshaped: list[tuple[fx.Proxy, fx.Node]] = []
        self.augmented: list[fx.Node] = []

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of `root`, a module, without what only decided control flow."""
        self.names: dict[int, str] = {}
        self.plain: dict[str, Tensor] = {}
        self.state = dict(named_state(root))
        for name, tensor in self.state.items():
            self.names.setdefault(id(tensor), name)
        modules = list(root.named_modules())
        self.modes = {m: m.training for _, m in modules}
        self.held = {m: {**m._parameters, **m._buffers} for _, m in modules}
        self.flags = {m: Flag(self, f"{n}.training".lstrip(".")) for n, m in modules}
        with (
            preserved(root.modules()), as_nodes(self), aten_as_nodes(self),
            batch_norms_as_nodes(self), checks_of_proxies(), distributions_of_proxies(),
            variables_of_proxies(), regions_as_nodes(self), sizes_stay(root), scripts_as_python(),
            items_as_nodes(self),
        ):  # fmt: skip
            set_modes(self.flags)
            if _hears_gradients(root):
                self.baked["backward hooks of the model itself left out"] = None
                vars(root).update(_backward_hooks={}, _backward_pre_hooks={})
            before = attributes(root)
            try:
                graph = super().trace(root, concrete_args)
                keep_in_place(graph, self.augmented, self.values.of_node)
                self.changed = written_attributes(graph, root, before)
            finally:
                self._take_back()
                self.changed |= changed_attributes(before, root)
        graph._tracer_cls = None
        for node in reversed(graph.nodes):
            node.meta.pop("is_wrapped", None)  # else the code would wrap torch's functions
            calls = node.op in ("call_function", "call_method")
            if not node.users and (node.op == "get_attr" or (calls and node.target in _PURE)):
                graph.erase_node(node)
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
        expression = None if _hooked(self.root) else expression_of(self.root)
        # _call_impl, not forward: it runs the root's hooks, and a forward set on the instance.
        call = functools.partial(expression, self.root) if expression else self.root._call_impl
        return functools.partial(self._run, call), []

    def _run(self, forward: Callable[..., Any]) -> Any:
        with proxies_are_tensors():
            result = forward(*self.bound.args, **self.bound.kwargs)
        keep_assigned(self)
        return result

    def _placeholder(self, name: str, value: Any) -> Any:
        """A proxy for an argument with tensors in it; any other is an argument without effect."""
        proxy = self.create_proxy("placeholder", name, (), {})
        self.values.env[proxy.node] = on_meta(value)
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            return proxy
        self.baked[f"argument `{name}` fixed at {value!r}"] = None
        return value

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        standard = m.__module__.startswith(("torch.nn", "torch.ao.nn"))
        plain = standard and not m._modules and not isinstance(m, nn.Sequential)
        return plain or module_qualified_name in self.opaque or module_qualified_name in self.forks

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.values.busy or self._is_function(m) or _is_given_nothing(m, args):
            return forward(*args, **kwargs)
        if not _hooked(m) and "forward" not in vars(m):
            signature_of(type(m).forward).bind(m, *args, **kwargs)  # code may try what it takes
        name = self.path_of_module(m)
        expression = self._expression(m)
        computing = name not in self.opaque and computes_weight(m)
        leaf = self.is_leaf_module(m, name) and not (computing or self._borrows(m))
        reason = None if computing else _left_whole(m, leaf, leaf or expression is not None)
        if reason:
            self.chosen.add(name)
            self.opaque.setdefault(name, f"{reason} at {user_line(sys._getframe())}")
        whole = functools.partial(self.create_proxy, "call_module", name, args, kwargs)
        if leaf or reason:
            return self._within(m, name, whole)
        mark, decisions = len(self.graph.nodes), self.mode_decisions
        baked, by_mode = self.baked.copy(), self.by_mode.copy()
        try:
            body = functools.partial(expression, m) if expression else forward
            result = self._within(m, name, functools.partial(body, *args, **kwargs))
            forks = self.mode_decisions != decisions
            if not (forks and (computing or (self.forking and not _has_state(m)))):
                return result
            self._roll_back(mark)
            self.baked, self.by_mode = baked, by_mode
            if computing:
                self.chosen.add(name)
                where = user_line(sys._getframe())
                self.opaque[name] = f"its weight is computed in another way in each mode at {where}"
            else:
                self.forks.add(name)
            return self._within(m, name, whole)
        except Exception as error:
            self._roll_back(mark)
            if any(map(self._borrows, m.modules())):  # called in the graph, they have their own
                raise
            self.opaque[name] = f"{first_line(error)} at {failed_at(error)}"
            try:
                return self._within(m, name, whole)
            except Exception:  # its arguments cannot be in a graph: left to the caller
                del self.opaque[name]
                raise error from None

    def _is_function(self, module: nn.Module) -> bool:
        """Whether the forward has made it for this call, without tensors of its own: a part of a
        `Sequential`, say."""
        if module in self.modes:
            return False
        own = (*module._parameters.values(), *module._buffers.values())
        return all(t is None or isinstance(t, fx.Proxy) for t in own)

    def _borrows(self, module: nn.Module) -> bool:
        """Whether the forward has put other tensors into a module for now, as `functional_call`
        does: which those are, only its own forward tells. (Code sets buffers of its own, too.)"""
        held = self.held.get(module)
        if held is None:  # made by the forward itself
            return False
        tables = (module._parameters, module._buffers)[: 1 + module.__module__.startswith("torch.")]
        return any(t is not held.get(key) for table in tables for key, t in table.items())

    def _expression(self, module: nn.Module) -> Expression | None:
        kind = type(module)
        if kind not in self.expressions:
            self.expressions[kind] = expression_of(module)
        return self.expressions[kind]

    def batch_norm(self, m: Any, x: Any) -> Any:
        """What torch's own forward does in a layer derived of it: a call of it as a plain one."""
        kind = plain_kind(m)
        if kind is None or m is self.root or m not in self.modes:
            return batch_norm(m, x)
        called = self.create_proxy("call_module", self.path_of_module(m), (x,), {})
        called.node.meta[PLAIN] = kind
        return called

    def _within(self, module: nn.Module, name: str, call: Callable[[], Any]) -> Any:
        """What `call` gives; its nodes belong to a call of `module`. Nodes share a stack."""
        outer, calls = self.module_stack, self.num_calls.get(name, 0)
        self.num_calls[name] = calls + 1
        self.module_stack = outer.copy()
        self.module_stack[f"{name}@{calls}" if calls else name] = name, type(module)
        try:
            return call()
        finally:
            self.module_stack = outer

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **named: Any
    ) -> Any:
        if target in _SHAPED_IN_PLACE and type(args[0]) is KnownProxy:
            shaped = self.create_proxy(kind, target.removesuffix("_"), args, kwargs)
            self.reshaped.append((args[0], args[0].node))
            args[0].node = shaped.node
            return args[0]
        target, args = spelled_out(target, args, self.values)
        if kwargs and not args and kind in ("call_function", "call_module"):
            layer = kind == "call_module"
            runs = type(self.root.get_submodule(target)).forward if layer else target
            args, kwargs = in_place(runs, kwargs)
        name = getattr(target, "__name__", target)
        if name in NUMBERS and needs_numbers(name, args, kwargs, self.values):
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
        return super().create_proxy(kind, target, args, kwargs, *more, **named)

    def _roll_back(self, mark: int) -> None:
        nodes = self.graph.nodes
        for node in list(itertools.islice(reversed(nodes), len(nodes) - mark)):
            self.graph.erase_node(node)
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
        ends = kind in ("placeholder", "output")
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
        if isinstance(a, np.generic):  # numpy's numbers are written in a way that needs its name
            return a.item()
        if kind is tuple or kind is list:
            return kind([self.create_arg(item) for item in a])
        if kind is dict and not a:
            return a
        if isinstance(a, fx.Proxy):
            if isinstance(a, Attribute) and a._node is not None and a._node._erased:
                a._node = None  # it was made by an attempt that was rolled back
            return a.node
        if isinstance(a, Tensor):
            if id(a) in self.names:
                return self.create_node("get_attr", self.names[id(a)], (), {})
            if a.grad_fn is not None:
                raise TypeError("a tensor computed from parameters in a way that cannot be traced")
        if dataclasses.is_dataclass(kind):  # what transformers return is a dictionary as well
            named = {f.name: getattr(a, f.name) for f in dataclasses.fields(kind) if f.init}
            return self.create_node("call_function", kind, (), self.create_arg(named))
        if kind is OrderedDict:
            return self.create_node("call_function", kind, (self.create_arg(dict(a)),), {})
        return super().create_arg(a)

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
        for reference in self.lent:
            if (proxy := reference()) is not None:
                vars(proxy).clear()


def _is_wrapped(target: Any) -> bool:
    """Whether a function came here by torch.fx.wrap, to be looked into."""
    package = getattr(target, "__module__", "").partition(".")[0]
    return isinstance(target, types.FunctionType) and package not in ("torch", *PLAIN_SIZES)


def _is_given_nothing(module: nn.Module, args: tuple[Any, ...]) -> bool:
    """Whether it gives back None, or another thing that code may look at."""
    return isinstance(module, nn.Identity) and not isinstance(args[0] if args else None, fx.Proxy)


def _has_state(module: nn.Module) -> bool:
    """Whether it has parameters or buffers, anywhere in it."""
    return any(True for _ in itertools.chain(module.parameters(), module.buffers()))


def _markable(result: Any) -> Any:
    """A list or tuple that a wrapped function returns, with the `node` that fx marks on it."""
    kind = type(result)
    marked = type(kind.__name__, (kind,), {"node": types.SimpleNamespace(meta={})})
    return marked(*result) if hasattr(result, "_fields") else marked(result)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _hears_gradients(module: nn.Module) -> bool:
    return bool(module._backward_hooks or module._backward_pre_hooks)


def _left_whole(module: nn.Module, leaf: bool, replaced: bool) -> str | None:
    """Why `module` must not be looked into; `replaced`: its forward would not be run as it is. A
    `leaf` is called, which runs what its gradients are for."""
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript module"
    if _hears_gradients(module) and not leaf:
        return "backward hooks"
    return "forward hooks" if replaced and _hooked(module) else None

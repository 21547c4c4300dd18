"""Any module -> fx graph: symbolic tracing that keeps names, hierarchy and train()/eval().

Beyond `torch.fx.Tracer`: `module.training` is a node, so the graph follows train() and eval(); composite
`torch.nn` modules appear as their parts (`expressions`); control flow on sizes follows the example inputs;
and a submodule that cannot be traced stays whole, with the reason in the notes.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import linecache
import operator
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import _pytree as pytree

from demp_fx.errors import DempError, TraceError, UsageError
from demp_fx.expressions import expression_of
from demp_fx.inputs import ExampleInputs, Inputs
from demp_fx.traced import TracedModule, TraceNotes, assemble

_TORCH, _HERE = (str(Path(str(file)).parent) + "/" for file in (torch.__file__, __file__))
# Functions written in C refuse a proxy for a size or a flag before they ask it to take over.
_BUILTINS = {
    f for m in (torch, F) for f in vars(m).values() if isinstance(f, types.BuiltinFunctionType)
}
# Nodes without a user that leave no trace: what is left of decided control flow.
_PURE = {getattr, operator.getitem, operator.not_, operator.eq, operator.ne, operator.lt, operator.gt}
_PURE |= {operator.le, operator.ge, operator.add, operator.sub, operator.mul, operator.mod}
_PURE |= {operator.floordiv, operator.truediv, operator.and_, operator.or_}


def trace(model: nn.Module, example_inputs: ExampleInputs) -> TracedModule:
    """Turn `model` into a graph of its leaf modules and torch functions.

    The result has the state_dict keys, the parameters and the train()/eval() flags of `model`. It shares
    leaf modules and tensors with it: deepcopy it before changing either. Arguments of forward that are
    not among the example inputs take their defaults and are no arguments of the result.
    `meta["demp_fx"]` holds the `TraceNotes`, each node's `meta["source"]` the user's "file:line".

    Args:
        model: any module; a GraphModule is traced anew.
        example_inputs: a tensor, or a tuple or dict of forward's arguments. Sizes that steer Python's
            control flow are taken from them; nothing is computed on their values.

    Raises:
        UsageError: the inputs do not fit forward's signature, or the model has to be unwrapped or
            initialised first.
        TraceError: the model's own forward could not be traced.
    """
    bound = _bind(_checked(model), Inputs.of(example_inputs))
    tracer = _Tracer(bound)
    own = set(vars(model))
    try:
        graph = tracer.trace(model)
        module = assemble(model, graph, type(model).__name__)
    except DempError:
        raise
    except Exception as error:
        raise TraceError(
            f"{_where(error)}: {type(model).__name__} could not be traced: {_first_line(error)}. "
            "Move these lines into a submodule, which is then left whole, or into a function "
            "decorated with torch.fx.wrap."
        ) from error
    finally:
        for constant in vars(model).keys() - own:  # fx keeps tensors it met on the way there
            delattr(model, constant)
    before = model.meta.get("demp_fx", TraceNotes()) if isinstance(model, fx.GraphModule) else TraceNotes()
    module.meta["demp_fx"] = TraceNotes(
        {**before.opaque, **tracer.opaque}, list(dict.fromkeys([*before.baked, *tracer.baked]))
    )
    return module


def _checked(model: nn.Module) -> nn.Module:
    """`model`, unless it is known that no graph can be made of it."""
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError("a TorchScript module has no Python to trace: hand in the original module")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise UsageError(f"{type(model).__name__} only wraps a model: hand in its `.module`")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise UsageError(f"{name} has no shape yet: run the model once on example inputs first")
    return model


def _bind(model: nn.Module, inputs: Inputs) -> inspect.BoundArguments:
    signature = inspect.signature(model.forward)
    try:
        return signature.bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        raise UsageError(
            f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}"
        ) from None


class _Tracer(fx.Tracer):
    """The symbolic tracer of one call of `trace`."""

    proxy_buffer_attributes = True

    def __init__(self, bound: inspect.BoundArguments) -> None:
        super().__init__(autowrap_functions=tuple(_BUILTINS))
        self._autowrap_search += [torch, F]
        self.bound = bound
        self.opaque: dict[str, str] = {}
        self.baked: dict[str, None] = {}
        self.proxies: dict[str, _TensorProxy] = {}

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        self.names = {id(t): n for n, t in [*root.named_parameters(), *root.named_buffers()]}
        self.modes = {m: m.training for m in root.modules()}
        self.flags = {m: _Flag(self, f"{n}.training".lstrip(".")) for n, m in root.named_modules()}
        self.set_modes(self.flags)
        try:
            graph = super().trace(root, concrete_args)
        finally:
            self.set_modes(self.modes)
        graph._tracer_cls = None
        for node in reversed(graph.nodes):
            if node.target in _BUILTINS:
                node.meta.pop("is_wrapped", None)  # else the code would wrap torch's own names
            if not node.users and (node.op == "get_attr" or node.target in _PURE):
                graph.erase_node(node)
        return graph

    @staticmethod
    def set_modes(modes: Mapping[nn.Module, Any]) -> None:
        for module, mode in modes.items():
            module.__dict__["training"] = mode

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        self.values = _Values(self)
        arguments = self.bound.arguments
        for name, value in arguments.items():
            kind = self.bound.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                value = tuple(self.placeholder(f"{name}_{i}", v) for i, v in enumerate(value))
            elif kind is inspect.Parameter.VAR_KEYWORD:
                value = {key: self.placeholder(key, v) for key, v in value.items()}
            else:
                value = self.placeholder(name, value)
            arguments[name] = value
        expression = None if _hooked(self.root) else expression_of(self.root)
        # _call_impl, not forward: it runs the root's hooks, and a forward set on the instance.
        call = functools.partial(expression, self.root) if expression else self.root._call_impl
        return functools.partial(call, *self.bound.args, **self.bound.kwargs), []

    def placeholder(self, name: str, value: Any) -> Any:
        """A proxy for an argument that has tensors in it; any other keeps its value."""
        proxy = self.create_proxy("placeholder", name, (), {})
        self.values.env[proxy.node] = _on_meta(value)
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            return proxy
        self.baked[f"argument `{name}` fixed at {value!r}"] = None
        return value

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        standard = m.__module__.startswith("torch.nn") or m.__module__.startswith("torch.ao.nn")
        return module_qualified_name in self.opaque or (standard and not m._modules)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        if self.values.busy:
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        expression = expression_of(m)
        reason = _left_whole(m, expression is not None or self.is_leaf_module(m, name))
        if reason:
            self.opaque.setdefault(name, f"{reason} at {_user_line(sys._getframe(1))}")
        if self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        mark, stack = len(self.graph.nodes), self.module_stack.copy()
        body = functools.partial(expression, m) if expression else forward
        try:
            return super().call_module(m, body, args, kwargs)
        except Exception as error:
            self.roll_back(mark)
            self.module_stack = stack
            self.opaque[name] = f"{_first_line(error)} at {_where(error)}"
            try:
                return super().call_module(m, forward, args, kwargs)
            except Exception:  # what it was called with cannot be in a graph: the caller's problem
                self.module_stack = stack
                del self.opaque[name]
                raise error from None

    def roll_back(self, mark: int) -> None:
        for node in reversed(list(self.graph.nodes)[mark:]):
            self.graph.erase_node(node)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        name = self.names.get(id(attr_val))
        if name is None or self.values.busy:
            return attr_val
        proxy = self.proxies.get(name)
        if proxy is None or proxy.node._erased:
            node = self.create_node("get_attr", name, (), {})
            proxy = self.proxies[name] = _TensorProxy(node, self, attr_val)
        return proxy

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["source"] = _user_line(sys._getframe(1))
        return node

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **named: Any) -> fx.Proxy:
        # An assertion about sizes holds; narrowing may change the sizes it speaks of.
        if target is torch._assert and self.values.of(args[0]) is True:
            return args[0]
        return super().create_proxy(kind, target, args, kwargs, *more, **named)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Attribute) and a._node is not None and a._node._erased:
            a._node = None  # made by an attempt that was rolled back
        if isinstance(a, Tensor):
            if id(a) in self.names:
                return self.create_node("get_attr", self.names[id(a)], (), {})
            if a.grad_fn is not None:
                raise TypeError("a tensor computed from parameters that tracing could not follow")
        return super().create_arg(a)

    def decided(self, proxy: Any) -> Any:
        """The value of `proxy`, noted as a decision for good; refused where it depends on data."""
        value = self.values.of(proxy)
        if value is _UNKNOWN or isinstance(value, Tensor):
            raise fx.proxy.TraceError(f"control flow depends on the values of `{proxy.node}`")
        self.note(proxy.node)
        return value

    def note(self, node: fx.Node) -> None:
        """Record that the user's line was followed for the value that `node` has now."""
        flags = self.values.flags
        modes = [flags[n.target] for n in (node, *node.all_input_nodes) if n.target in flags]
        what = f"{'train' if modes[0] else 'eval'} mode" if modes else "the example inputs' sizes"
        where = _user_line(sys._getframe(2))
        file, line = where.rsplit(":", 1)
        self.baked[f"{where}: `{linecache.getline(file, int(line)).strip()}` followed for {what}"] = None

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.decided(obj))

    def length(self, proxy: Any) -> int:
        value = self.values.of(proxy)
        if isinstance(value, Tensor):
            self.note(proxy.node)
        return len(value if hasattr(value, "__len__") else self.decided(proxy))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        value = self.values.of(obj)
        if isinstance(value, dict):
            return iter(value)
        return iter([obj[i] for i in range(self.length(obj))])
class _Known:
    """What of a proxy is known from the example inputs may steer Python."""

    tracer: _Tracer
    node: fx.Node

    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self.tracer.length(self)

    def __index__(self) -> int:
        return int(self.tracer.decided(self))

    __int__ = __index__

    def __float__(self) -> float:
        return float(self.tracer.decided(self))

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class _Proxy(_Known, fx.Proxy):
    pass


class _Attribute(_Known, Attribute):
    pass


class _TensorProxy(_Proxy):
    """A parameter or buffer; its sizes are plain numbers."""

    def __init__(self, node: fx.Node, tracer: _Tracer, tensor: Tensor) -> None:
        super().__init__(node, tracer)
        self.shape, self.ndim = tensor.shape, tensor.ndim
        self.size, self.dim, self.numel = tensor.size, tensor.dim, tensor.numel


class _Flag(_Proxy):
    """`module.training`: a node of its own from its first use on."""

    def __init__(self, tracer: _Tracer, target: str) -> None:
        self.tracer, self.target = tracer, target
        self._node: fx.Node | None = None

    @property
    def node(self) -> fx.Node:
        if self._node is None or self._node._erased:
            self._node = self.tracer.create_node("get_attr", self.target, (), {})
        return self._node


class _Unknown:
    pass


_UNKNOWN = _Unknown()


class _Values(fx.Interpreter):
    """What nodes give on meta tensors, worked out when asked for: sizes are known, data is not."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__(tracer.root, garbage_collect_values=False, graph=tracer.graph)
        self.tracer = tracer
        self.busy = False  # modules run for real, nothing is recorded
        self.tried: set[fx.Node] = set()
        self.flags = {flag.target: tracer.modes[m] for m, flag in tracer.flags.items()}

    def of(self, proxy: Any) -> Any:
        """The value of a proxy, or `_UNKNOWN`; anything but a proxy is its own value."""
        if not isinstance(proxy, fx.Proxy):
            return proxy
        node = proxy.node
        pending = []
        while node.op != "root" and node not in self.tried:
            pending.append(node)
            node = node.prev
        for node in reversed(pending):
            self.tried.add(node)
            if node not in self.env:
                with contextlib.suppress(Exception), self.running():
                    self.env[node] = self.run_node(node)
        return self.env.get(proxy.node, _UNKNOWN)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self.busy = True
        try:
            with torch.no_grad(), torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            self.busy = False

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.flags:
            return self.flags[target]
        return _on_meta(super().get_attr(target, args, kwargs))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        state = _on_meta({**dict(module.named_parameters()), **dict(module.named_buffers())})
        inside = {m: self.tracer.modes[m] for m in module.modules()}
        self.tracer.set_modes(inside)
        try:
            return torch.func.functional_call(module, state, args, kwargs)
        finally:
            self.tracer.set_modes({m: self.tracer.flags[m] for m in inside})


def _on_meta(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.to("meta"), value)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _left_whole(module: nn.Module, replaced: bool) -> str | None:
    """Why `module` must not be looked into; `replaced`: its forward would not be run as it is."""
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript module"
    if is_parametrized(module):
        return "parametrized: " + ", ".join(module.parametrizations)
    return "forward hooks" if replaced and _hooked(module) else None


def _user_line(frame: types.FrameType | None) -> str:
    """"file:line" of the innermost frame outside torch and this package, not beyond `trace`."""
    inner = ""
    while frame is not None and frame.f_code is not trace.__code__:
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH, _HERE)):
            return f"{file}:{frame.f_lineno}"
        if not inner and not file.startswith((_TORCH + "fx/", _HERE)):
            inner = f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return inner or "torch:0"


def _where(error: BaseException) -> str:
    """"file:line" of the innermost frame outside torch and this package that `error` passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if not f.filename.startswith((_TORCH, _HERE))]
    frame = ours[-1] if ours else frames[-1]
    return f"{frame.filename}:{frame.lineno}"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"

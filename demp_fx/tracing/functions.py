"""What of torch is replaced while a model is traced.

ATen's functions become nodes whatever argument the proxy is. A batch norm's forward, which branches
on `training`, is one wherever a subclass calls it; and checks of what is traced are passed.
(Autograd functions: see `autograd.py`.)
"""

from __future__ import annotations

import functools
import importlib
import itertools
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import fx
from torch.autograd import Variable
from torch.distributions import Distribution
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import _get_overridable_functions
from torch.utils._device import _device_constructors

from demp_fx.expressions import attention_function
from demp_fx.tracing.values import DRAWS


def proxy_in(arguments: Iterable[Any]) -> fx.Proxy | None:
    """The first proxy among arguments, or in a list, tuple or slice among them."""
    for argument in arguments:
        if isinstance(argument, fx.Proxy):
            return argument
        if isinstance(argument, slice):
            argument = (argument.start, argument.stop, argument.step)
        if isinstance(argument, (tuple, list)):
            found = proxy_in(argument)
            if found is not None:
                return found
    return None


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which given a proxy is a node."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        proxy = proxy_in((*args, *kwargs.values()))
        if proxy is None:
            return function(*args, **kwargs)
        return proxy.tracer.create_proxy("call_function", function, args, kwargs)

    return wrapper


# Limits of a dtype: classes, which know nothing of proxies.
_LIMITS = (torch.finfo, torch.iinfo)
_C: Any = torch._C
_HOMES = (_C._VariableFunctions, _C._nn, _C._fft, _C._linalg, _C._special)
# ATen's own functions refuse a proxy as a size or a flag before they ask it to take over.
_RECORDED: dict[types.ModuleType, dict[str, Any]] = {
    module: {
        name: _recorded(function)
        for name, function in vars(module).items()
        if function in _LIMITS
        or (
            isinstance(function, types.BuiltinFunctionType)
            and any(hasattr(home, function.__name__) for home in _HOMES)
        )
    }
    for module in (torch, F, torch.fft, torch.linalg, torch.special)
}
ATEN = {id(vars(module)[name]) for module, table in _RECORDED.items() for name in table}


def _drawn(tracer: Any, recorded: Callable[..., Any]) -> Callable[..., Any]:
    """A draw that is a node; one from a generator of the code's own can be in no graph."""
    function: Any = recorded.__wrapped__  # type: ignore[attr-defined]

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if tracer.values.busy or kwargs.get("generator") is not None:
            return function(*args, **kwargs)
        return tracer.create_proxy("call_function", function, args, kwargs)

    return wrapper


@contextmanager
def aten_as_nodes(tracer: Any) -> Iterator[None]:
    """Meanwhile ATen's functions of proxies are nodes, where they are called as torch's."""
    # torch lists its functions once, for good: not while others stand in for them.
    for listed in (_device_constructors, _get_overridable_functions):
        listed()
    with torch.device("cpu"):  # whatever the caller's default is
        importlib.import_module("torch._dynamo")  # which the first dispatch mode would import
    with ExitStack() as stack:
        for module, recorded in _RECORDED.items():
            table = vars(module)
            stack.callback(table.update, {name: table[name] for name in recorded})
            mine = {n: f for n, f in recorded.items() if table[n] is f.__wrapped__}
            draws = {n: _drawn(tracer, f) for n, f in mine.items() if n in DRAWS}
            table.update(mine | draws)
        yield


# What a tensor is told sizes or places for, which its own code wants as numbers.
_SIZED = ("expand", "view", "reshape", "repeat", "tile", "narrow", "select", "roll", "unflatten",
          "new_zeros", "new_ones", "new_full", "new_empty")  # fmt: skip


def _told(name: str) -> Callable[..., Any]:
    """A method of tensors that is a node where it is told a proxy (as any method of a proxy is)."""
    method = getattr(torch.Tensor, name)

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        proxy = proxy_in((*args, *kwargs.values()))
        if proxy is None:
            return method(self, *args, **kwargs)
        return proxy.tracer.create_proxy("call_method", name, (self, *args), kwargs)

    return call


@contextmanager
def methods_as_nodes() -> Iterator[None]:
    """Meanwhile the methods of the code's own tensors take proxies for sizes."""
    kind: Any = torch.Tensor
    before = {name: vars(kind).get(name) for name in _SIZED}
    for name in _SIZED:
        setattr(kind, name, _told(name))
    try:
        yield
    finally:
        for name, method in before.items():
            if method is None:
                delattr(kind, name)
            else:
                setattr(kind, name, method)


@contextmanager
def scripts_as_python() -> Iterator[None]:
    """Meanwhile a function that TorchScript has compiled runs, on proxies, as it was written."""
    kind: Any = torch.jit.ScriptFunction
    compiled = kind.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        written = getattr(self, "_torchdynamo_inline", None)  # where torch.compile looks for it
        proxies = proxy_in((*args, *kwargs.values())) is not None
        return written(*args, **kwargs) if written and proxies else compiled(self, *args, **kwargs)

    kind.__call__ = call
    try:
        yield
    finally:
        kind.__call__ = compiled


@contextmanager
def attention_in_parts() -> Iterator[None]:
    """Meanwhile torch's function for attention is, on proxies, what it consists of."""
    table = vars(F)
    whole = table["multi_head_attention_forward"]

    @functools.wraps(whole)
    def attention(*args: Any, **kwargs: Any) -> Any:
        if proxy_in((*args, *kwargs.values())) is not None:
            with suppress(NotImplementedError):
                return attention_function(*args, **kwargs)
        return whole(*args, **kwargs)

    table["multi_head_attention_forward"] = attention
    try:
        yield
    finally:
        table["multi_head_attention_forward"] = whole


@contextmanager
def batch_norms_as_nodes(tracer: Any) -> Iterator[None]:
    """Meanwhile `super().forward(x)` in a subclass of a batch norm follows train() and eval()."""
    whole = _BatchNorm.forward

    def forward(self: Any, input: Any) -> Any:
        traced = isinstance(input, fx.Proxy)
        return tracer.batch_norm(self, input) if traced else whole(self, input)

    kinds: Any = _BatchNorm
    kinds.forward = forward
    try:
        yield
    finally:
        kinds.forward = whole


@contextmanager
def variables_of_proxies() -> Iterator[None]:
    """Meanwhile `torch.autograd.Variable` of a proxy is that: of a tensor it is the tensor, too."""
    kind: Any = Variable

    def new(cls: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(data, fx.Proxy):
            return data
        return super(kind, cls).__new__(cls, data, *args, **kwargs)

    kind.__new__ = new
    try:
        yield
    finally:
        del kind.__new__


# What torch.compile is told of a tensor; the sizes and the memory of a proxy are nobody's yet.
_MARKS = ("mark_static", "mark_static_address", "mark_dynamic", "maybe_mark_dynamic")


@contextmanager
def checks_of_proxies() -> Iterator[None]:
    """Meanwhile `torch._check` and its like pass over proxies: a graph is for inputs that fit. So
    do the marks that a compiler wants."""
    compiler: Any = importlib.import_module("torch._dynamo")
    names = {torch: ("_check_with", "_check_tensor_all_with"), compiler: _MARKS}
    before = {module: {n: vars(module)[n] for n in names[module]} for module in names}

    def passing(function: Callable[..., None]) -> Callable[..., None]:
        def passed(*args: Any, **kwargs: Any) -> None:
            if proxy_in(args) is None:
                function(*args, **kwargs)

        return passed

    for module, functions in before.items():
        vars(module).update({name: passing(function) for name, function in functions.items()})
    try:
        yield
    finally:
        for module, functions in before.items():
            vars(module).update(functions)


@contextmanager
def kinds_of_devices(tracer: Any) -> Iterator[None]:
    """Meanwhile torch tells how it casts on the device of a proxy: `x.device.type` is known."""
    names = ("is_autocast_enabled", "get_autocast_dtype")
    before = {name: vars(torch)[name] for name in names}

    def told(ask: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *device: ask(*map(tracer.values.of, device))

    vars(torch).update({name: told(ask) for name, ask in before.items()})
    try:
        yield
    finally:
        vars(torch).update(before)


@contextmanager
def distributions_of_proxies() -> Iterator[None]:
    """Meanwhile `torch.distributions` neither look at the numbers that they are given, nor take the
    sizes of a sample for numbers."""

    def extended(self: Any, sample_shape: Iterable[Any] = ()) -> tuple[Any, ...]:
        return (*sample_shape, *self._batch_shape, *self._event_shape)

    def broadcast(*shapes: Any) -> Any:
        if proxy_in(shapes) is None:
            return together(*shapes)
        backwards = itertools.zip_longest(*(tuple(shape)[::-1] for shape in shapes), fillvalue=1)
        return tuple(next((n for n in sizes if n != 1), 1) for sizes in backwards)[::-1]

    kind: Any = Distribution
    checks, shape = kind._validate_args, kind._extended_shape
    home: Any = torch
    together = home.broadcast_shapes
    kind._validate_args, kind._extended_shape = False, extended
    home.broadcast_shapes = broadcast
    try:
        yield
    finally:
        kind._validate_args, kind._extended_shape = checks, shape
        home.broadcast_shapes = together

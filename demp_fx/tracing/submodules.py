"""Calls of modules while a model is traced: looked into, a leaf of the graph, or left whole."""

from __future__ import annotations

import functools
import itertools
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn

from demp_fx.expressions import Expression, batch_norm, expression_of
from demp_fx.tracing.arguments import check_taken
from demp_fx.tracing.computed import computes_weight, in_both_modes
from demp_fx.tracing.decisions import Decisions
from demp_fx.tracing.modes import is_kept
from demp_fx.tracing.norms import PLAIN, plain_kind
from demp_fx.tracing.source import failed_at, first_line, user_line

_NAMED = "demp_fx: arguments by name"


class Submodules(Decisions):
    """A tracer that chooses for each call of a module.

    Args:
        forking: leave modules whole that have no state and ask for the mode: a graph has one way.

    Attributes:
        opaque: see `TraceNotes`.
        chosen: the modules in `opaque` that are meant to be left whole.
        forks: the modules that were left whole for `forking`.
        modes, held: of all modules of the root, their true modes and what they hold.
        kept: the modules among them that stay in their mode.
    """

    def __init__(self, autowrap_modules: Any, forking: bool) -> None:
        super().__init__(autowrap_modules)
        self.forking = forking
        self.opaque: dict[str, str] = {}
        self.chosen: set[str] = set()
        self.forks: set[str] = set()
        self.modes: dict[nn.Module, bool] = {}
        self.kept: dict[nn.Module, bool] = {}
        self.held: dict[nn.Module, dict[str, Tensor | None]] = {}
        self.expressions: dict[type[nn.Module], Expression | None] = {}

    @abstractmethod
    def _roll_back(self, mark: int) -> None:
        """Forget the nodes after the first `mark`."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        standard = m.__module__.startswith(("torch.nn", "torch.ao.nn"))
        plain = standard and not m._modules and not isinstance(m, nn.Sequential)
        return plain or module_qualified_name in self.opaque or module_qualified_name in self.forks

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        kwargs, forward = kwargs.get(_NAMED, kwargs), uncompiled(m, forward)
        if self.values.busy or self._is_function(m) or _is_given_nothing(m, args):
            return forward(*args, **kwargs)
        scripted = isinstance(m, torch.jit.ScriptModule)  # torch cannot be asked for its forward
        if not (scripted or is_hooked(m) or "forward" in vars(m)):
            check_taken(type(m).forward, (m, *args), kwargs)  # code may try what it takes
        name = self.path_of_module(m)
        expression = self._expression(m)
        computing = name not in self.opaque and computes_weight(m)
        leaf = self.is_leaf_module(m, name) and not (
            computing or self._borrows(m) or (m in self.modes and is_kept(m))
        )
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
            with in_both_modes(m) if computing else nullcontext():
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
        if kind is None or m is self.root or m not in self.modes or is_kept(m):
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


@contextmanager
def any_keyword() -> Iterator[None]:
    """Meanwhile modules may be called with any keyword: fx's own wrapper takes the module as `mod`,
    so that arguments go past it as one."""
    through = nn.Module.__call__

    def call(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        return through(module, *args, **{_NAMED: kwargs}) if kwargs else through(module, *args)

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = through  # type: ignore[method-assign]


def uncompiled(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """What a call of `module` runs, without torch.compile: no graph can be made of what that runs,
    and it can be asked for the narrow module anew."""
    if type(module).__name__ == "OptimizedModule":
        return module._modules["_orig_mod"]  # type: ignore[return-value]
    return module._call_impl if vars(module).get("_compiled_call_impl") else forward


def _is_given_nothing(module: nn.Module, args: tuple[Any, ...]) -> bool:
    """Whether it gives back None, or another thing that code may look at."""
    return isinstance(module, nn.Identity) and not isinstance(args[0] if args else None, fx.Proxy)


def _has_state(module: nn.Module) -> bool:
    """Whether it has parameters or buffers, anywhere in it."""
    return any(True for _ in itertools.chain(module.parameters(), module.buffers()))


def is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def hears_gradients(module: nn.Module) -> bool:
    return bool(module._backward_hooks or module._backward_pre_hooks)


def _left_whole(module: nn.Module, leaf: bool, replaced: bool) -> str | None:
    """Why `module` must not be looked into; `replaced`: its forward would not be run as it is. A
    `leaf` is called, which runs what its gradients are for."""
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript module"
    if hears_gradients(module) and not leaf:
        return "backward hooks"
    return "forward hooks" if replaced and is_hooked(module) else None

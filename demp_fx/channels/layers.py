"""Calls of modules on meta tensors: of torch's own, of somebody's own, and of what stays whole."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from demp_fx.channels.custom import LayerOp
from demp_fx.channels.facts import in_each_mode
from demp_fx.channels.meta import on_zeros
from demp_fx.channels.places import Places
from demp_fx.channels.stream import Rule
from demp_fx.channels.value import Call, Value
from demp_fx.shapes import Shape
from demp_fx.trees import tensors_of


class Layers(Places):
    """A stream of ATen ops under the modules and functions that a graph calls.

    `real`: a context in which parameters have their numbers.
    """

    def __init__(
        self, rule_of: Callable[[torch._ops.OpOverload], Rule], shapes: Mapping[Any, Shape],
        with_facts: bool, labelled: bool,
    ) -> None:  # fmt: skip
        super().__init__(rule_of, shapes, with_facts, labelled)
        self.real: Callable[[], AbstractContextManager[None]] = nullcontext

    def _module(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Run a module; one of the user's own, whose code may ask for the mode, in both: what
        either of them couples is coupled."""
        if type(module).__module__.startswith("torch.") or not self.labelled:
            return module(*args, **kwargs)
        modes = {m: m.training for m in module.modules()}
        try:
            evaluated = module.eval()(*args, **kwargs)
            trained = module.train()(*args, **kwargs)
        finally:
            for m, mode in modes.items():
                m.training = mode
        found = {}
        for a, b in zip(tensors_of(evaluated), tensors_of(trained), strict=True):
            found[b if module.training else a] = self._either_way(a, b, module.training)
        out = trained if module.training else evaluated
        return pytree.tree_map_only(Tensor, found.__getitem__, out)

    def _either_way(self, evaluated: Tensor, trained: Tensor, training: bool) -> Tensor:
        """One of two tensors, of which an index has to stay if that of the other does; of what is
        known of it, what is known of both."""
        first, second = self.value(evaluated), self.value(trained)
        if [x.shape for x in first.labels] != [x.shape for x in second.labels]:
            self._pin((evaluated, trained), "its channels are others in the other mode")
        for one, other in zip(first.labels, second.labels, strict=False):
            if one.shape == other.shape:
                self.system.same(one, other, self.site)
        out = (trained if training else evaluated).detach()
        facts = in_each_mode(first.facts, second.facts) if self.with_facts else None
        labels = (second if training else first).labels
        out.__dict__["demp"] = Value(labels, facts, None, self.version(out))
        return out

    def _leaf(self, run: Callable[..., Any], args: Any, kwargs: Any, reason: str) -> Any:
        """A submodule or function that is not looked into: what goes into it stays as it is."""
        self._pin((args, kwargs), reason)
        return self._ran(run, args, kwargs)

    def _recurrent(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        """A recurrent layer, met as a whole: its kernels are many small ones for each step, of
        which one is run, as all give the same shapes."""
        steps, *state = args = inspect.signature(layer.forward).bind(*args, **kwargs).args
        op = LayerOp(layer)
        if isinstance(steps, Tensor) and isinstance(layer, nn.RNNBase):
            dim = int(layer.batch_first and steps.dim() == 3)
            one, last = self._ran(layer, (steps.narrow(dim, 0, 1), *state), {})
            shape = [steps.size(d) if d == dim else n for d, n in enumerate(one.shape)]
            out: Any = (one.new_empty(shape), last)
        else:
            out = self._ran(layer, args, {})
        if self.labelled:
            call: Any = op
            self._meet(Call(call, args, {}, out, replace(self.site, op=str(op))))
        else:
            self.system.macs += op.macs(args[0])
        return out

    def _ran(self, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What a module gives, outside of the mode."""
        try:
            return run(*args, **kwargs)
        except Exception:
            with self.real():
                return on_zeros(run, args, kwargs)

    def _pin(self, tree: Any, reason: str) -> None:
        for tensor in tensors_of(tree):
            for label in self.value(tensor).labels:
                self.system.pin(label, reason, self.site)

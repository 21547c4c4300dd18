"""The stream of ATen ops under a network: each runs on meta tensors and says what it couples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from demp_fx.channels.constraints import Site
from demp_fx.channels.custom import FunctionOp, LayerOp, written
from demp_fx.channels.labels import same_label, varying
from demp_fx.channels.meta import as_meta, on_zeros
from demp_fx.channels.running import Running
from demp_fx.channels.shares import shares_of
from demp_fx.channels.signs import is_never_negative, is_positive
from demp_fx.channels.system import Mark
from demp_fx.channels.value import Call, Value
from demp_fx.channels.values import Values
from demp_fx.channels.writes import Write, memory_of
from demp_fx.errors import DempError
from demp_fx.shapes import Shape, shape_of
from demp_fx.tracing.autograd import Apply
from demp_fx.tracing.source import first_line
from demp_fx.trees import tensors_of

# How ops are called that take no more of their operand than its dtype, or a number of the code's;
# what holds the same along an axis, which can have channels there; and layers, which have weights.
NEW = ("aten::new_", "aten::lift_fresh", "aten::expand", LayerOp.NAME)
EMPTY = torch.ops.aten.empty.memory_format
FAILED = "an error in the rule of"  # how the reason of a pin begins where a rule has failed

Rule = Callable[["Stream", Call], None]


class Stream(Values, TorchDispatchMode):
    """While active, every ATen op goes through its rule, which records constraints in `system`.

    `rule_of` gives the rule of an op, `shapes` shortcuts past slow meta kernels. Without `labelled`
    only shapes and multiplications are found out.
    """

    def __init__(
        self,
        rule_of: Callable[[torch._ops.OpOverload], Rule],
        shapes: Mapping[Any, Shape],
        with_facts: bool = True,
        labelled: bool = True,
    ) -> None:
        TorchDispatchMode.__init__(self)
        Values.__init__(self, with_facts, labelled)
        self.rule_of, self.shapes = rule_of, shapes
        self.activations: dict[str, int] = {}
        self.reweighted = False  # whether a parameter or buffer was written into
        self.picked = False  # whether a mask that is not known tells a size
        self.merged = False  # whether a channel axis was merged with another, such as the batch
        self.running: Running
        self.zeros_matter: bool | None = None  # to sums; None: that depends on the running node
        self.applied = 0  # of the node that runs: how many ops touched channels,
        self.moves = 0  # how many of them only moved data,
        self.unfit: list[tuple[Tensor, str]] = []  # labels moved in a way that narrowing breaks,
        self.shaped: list[Tensor] = []  # labels that have become blocks,
        self.sliced: set[str] = set()  # nodes that take a part of an axis,
        self.splits = False  # whether an axis was split into blocks,
        self.opens = False  # and whether its channels go in with blocks, or come out of them,
        self.joins = False  # or are those of several values, which lie side by side

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nobody compiles a walk: torch need not guard each op against it."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is EMPTY and not all(args[0]):
            return func(*args, **kwargs)  # without numbers, as batch norm makes one in eval mode
        shape = shape_of(func, self.shapes, kwargs)
        try:
            out = func(*args, **kwargs) if shape is None else shape(args)
        except NotImplementedError:
            given = self._with_masks(args, kwargs)
            self.picked |= any(t.dtype == torch.bool and t.is_meta for t in tensors_of(given))
            out = on_zeros(func, *given)
        except RuntimeError:  # a tensor that the model's code made of its own
            args, kwargs = as_meta((args, kwargs))
            try:
                out = func(*args, **kwargs)
            except RuntimeError:
                if func.namespace == "aten":
                    raise
                out = on_zeros(func, args, kwargs)  # an op of somebody's own, without a fake
        if self.labelled:
            self.met(func, args, kwargs, out)
        else:
            self._dry(func, args, out)
        return out

    def met(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Take down that an op was called: what it writes, and what it couples."""
        site = Site(_name(func), self.site.node, self.site.source)
        call = Call(func, args, kwargs, out, site)
        writes = []
        for tensor in written(func, args, kwargs):
            storage = memory_of(tensor)
            self.reweighted |= storage in self.system.uses
            write = Write.by(func, args, tensor, self.running.sized)
            self.writes[storage] = (*self.writes.get(storage, ()), write)
            writes.append((write, self.value(tensor)))
        self._meet(call)
        for write, before in writes:
            value, labels = self.value(write.tensor), before.labels
            new = [x for x in value.labels if not any(same_label(x, y) for y in labels)]
            stay = len(value.labels) - len(new) == len(labels)
            if stay and all(self._is_free(x, before) for x in new):
                write.labels, write.facts = value.labels, value.facts
            elif func is torch.ops.aten.copy_.default:
                many = [x for x in value.labels if len(varying(x)) > 1]
                if len(many) == 1 and all(len(varying(x)) == 1 for x in labels):
                    write.finer, write.coarse, write.facts = many[0], labels, value.facts

    def _is_free(self, label: Tensor, before: Value) -> bool:
        """Whether a value can have taken a label: as a constant, or as one whose channels stay."""
        return set(varying(label)) <= before.blank or self.system.is_fixed(label)

    def _dry(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        """Where only shapes are wanted: count multiplications, and see that indices are there."""
        flops = flop_registry.get(func._overloadpacket)
        if flops is not None:
            self.system.macs += flops(*args, out_val=out) // 2
        if func._overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_select):
            dims = [args[1]] if isinstance(args[1], int) else range(len(args[1]))
            picks = [args[2]] if isinstance(args[1], int) else args[1]
            for dim, pick in zip(dims, picks, strict=True):
                known = None if pick is None or pick.dtype == torch.bool else pick
                if known is not None and known.is_meta:
                    known = self.value(known).data
                if known is None or known.is_meta or not known.numel():
                    continue
                if int(known.max()) >= args[0].size(dim):
                    raise IndexError(f"there is no channel {int(known.max())} any more")

    def _with_masks(self, args: Any, kwargs: Any) -> Any:
        """Arguments with the true values of masks and indices that are known: they tell sizes."""

        def real(t: Tensor) -> Tensor:
            data = None if t.is_floating_point() else self.value(t).data
            return t if data is None or data.is_meta else data

        return pytree.tree_map_only(Tensor, real, (args, kwargs))

    def function(self, target: Apply, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an autograd function as one op, whatever its forward is made of (outside of the
        mode, which would see that)."""
        try:
            out = target(*args, **kwargs)
        except Exception:
            out = on_zeros(target, args, kwargs)
        op: Any = FunctionOp(target)
        self._meet(Call(op, args, kwargs, out, Site(str(op), self.site.node, self.site.source)))
        return out

    def _meet(self, call: Call) -> None:
        """Apply the rule of a call if anything is known of what goes into it, or nothing does."""
        values = [self.value(tensor) for tensor in call.tensors]
        makes = not values or call.op._schema.name.startswith(NEW)
        if makes or any(v.labels or v.known is not None or v.vector or v.blank for v in values):
            self._apply(call, values)
        shares = shares_of(call, values[0], self.running) if values else None
        if shares is not None:
            self.value(call.outputs[0]).shares = shares
        if self.with_facts and values and call.outputs:
            value = self.value(call.outputs[0])
            value.never_negative = is_never_negative(call, values[0])
            value.positive = is_positive(call, values[0])

    def _apply(self, call: Call, before: list[Value]) -> None:
        self.applied += bool(call.tensors)
        start, moves = self.system.mark(), self.moves
        unfit, shaped = len(self.unfit), len(self.shaped)
        try:
            self.rule_of(call.op)(self, call)
        except (IndexError, DempError):  # a node that does not fit what it is given is refused
            raise
        except Exception as error:  # nothing that half a rule has said is relied on
            self.system.forget(start)
            self.moves = moves
            del self.unfit[unfit:], self.shaped[shaped:]
            for tensor, value in zip(call.tensors, before, strict=True):
                tensor.__dict__["demp"] = value
            self.leave(call, f"{FAILED} {call.op._schema.name}: {first_line(error)}")
        if not call.op.is_view and all(self.value(out).data is None for out in call.outputs):
            self.use(call, before)

    def use(self, call: Call, before: list[Value]) -> None:
        """Remember who computes with parameters, and does not only move them."""
        uses = self.system.uses
        for tensor, value in zip(call.tensors, before, strict=True):
            for holder in (tensor,) if value.data is None else (tensor, value.data):
                if (storage := memory_of(holder)) in uses:
                    uses[storage].add(call.site)

    def abandon(self, start: Mark, reason: str) -> None:
        """Drop what was recorded since `start`, as what runs is not followed after all: parameters
        that its code has computed with stay as they are."""
        self.system.forget(start)
        for name, value in self.params.items():
            if any(site.node == self.site.node for site in self.system.uses_of(name)):
                for label in value.labels:
                    self.system.pin(label, reason, self.site)

    # -- what rules use -------------------------------------------------------------------------

    def leave(self, call: Call, reason: str) -> None:
        """Everything that a call touches stays as it is, and nothing is known of what it gives."""
        for tensor in call.tensors:
            for label in self.value(tensor).labels:
                self.pin(call, label, reason)
        for tensor in written(call.op, call.args, call.kwargs):
            self.value(tensor).known = None
        for out in call.outputs:
            self.give(out, ())

    def maker(self, weight: Tensor) -> str | None:
        """The node that computed a weight of parameters alone, where the running node is given
        such a one (or takes a view of it)."""
        return self.running.makers.get(memory_of(weight))


@functools.cache
def _name(op: torch._ops.OpOverload) -> str:
    return str(op)

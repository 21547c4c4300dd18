"""What a model's code decides while it is traced: by sizes and by the mode, and noted each time."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from demp_fx.tracing.checks import passing
from demp_fx.tracing.memo import ASKS, Memo, is_size, memo_of
from demp_fx.tracing.source import quoted, user_line, users_frame
from demp_fx.tracing.values import UNKNOWN, Values


class Decisions(fx.Tracer):
    """A tracer whose proxies may decide.

    Attributes:
        values: what is known of the graph's values.
        baked: see `TraceNotes`.
        by_mode: the entries of `baked` that are decisions on train or eval mode.
        mode_decisions: how many of them there were.
        checks: the nodes that a check has looked at, which is taken as passed.
        memos: what was taken as made for other sizes; None where that is as the example has it.
    """

    values: Values

    def __init__(self, autowrap_modules: Any) -> None:
        super().__init__(autowrap_modules=autowrap_modules)
        self.baked: dict[str, None] = {}
        self.by_mode: set[str] = set()
        self.mode_decisions = 0
        self.checks: set[fx.Node] = set()
        self.memos: set[Memo] | None = set()

    def decided(self, proxy: Any) -> Any:
        """The value of `proxy`, from now on taken as given; refused where it depends on data."""
        value = self.values.of(proxy)
        if isinstance(value, Tensor):
            value = self.values.real(proxy.node)
        if value is UNKNOWN:
            raise TypeError("control flow depends on the values in a tensor")
        self._note(proxy.node)
        return value

    def _note(self, node: fx.Node) -> None:
        modes = self.values.training
        found = [modes[n.target] for n in (node, *node.all_input_nodes) if n.target in modes]
        what = f"{'train' if found[0] else 'eval'} mode" if found else self._property(node)
        note = f"{quoted(user_line(sys._getframe()))} followed for {what}"
        self.baked[note] = None
        if found:
            self.mode_decisions += 1
            self.by_mode.add(note)

    def _property(self, node: fx.Node) -> str:
        """What of the example inputs a node asks for."""
        kinds = {type(self.values.of_node(n)) for n in (node, *node.all_input_nodes)}
        asked = "dtype" if torch.dtype in kinds else "sizes"
        return f"the example inputs' {'device' if kinds & {torch.device, str} else asked}"

    def to_bool(self, obj: fx.Proxy) -> bool:
        if obj.node.target in ASKS and self._is_of_another_size(obj.node, sys._getframe(1)):
            return ASKS[obj.node.target]
        try:
            return bool(self.decided(obj))
        except TypeError:
            frame = users_frame(sys._getframe(1))
            passes = None if frame is None else passing(frame)
            if passes is None:
                raise
        self.checks.add(obj.node)
        self.baked[f"{quoted(user_line(sys._getframe()))} taken as passed"] = None
        return passes

    def _is_of_another_size(self, node: fx.Node, frame: types.FrameType) -> bool:
        """Whether `node` asks for what is kept until sizes change: it is made anew then."""
        asks = users_frame(frame)
        if asks is None or self.memos is None:
            return False
        found = memo_of(node, asks)
        if found is None or not all(is_size(self.values.of_node(n)) for n in node.all_input_nodes):
            return False
        self.memos.add(found)
        return True

    def length(self, proxy: Any) -> int:
        """How many items `proxy` has."""
        value = self.values.of(proxy)
        if isinstance(value, Tensor):
            self._note(proxy.node)
        return len(value if hasattr(value, "__len__") else self.decided(proxy))

    def iter(self, obj: Any) -> Iterator[Any]:
        value = self.values.of(obj)
        return iter(value if isinstance(value, dict) else [obj[i] for i in range(len(obj))])

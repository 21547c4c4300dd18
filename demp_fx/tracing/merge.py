"""Two graphs of one model, of eval and of train mode and in two dtypes, as one that follows both.

Where a number or a flag differs it depends on the mode: it is read from the `training` of the
module it belongs to. Where a dtype differs it depends on the parameters': it is read from one.
Where one graph has a size and the other a number, the size is taken.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
# Copies that are made or not, as the memory layout of what a kernel returns asks for.
_LAYOUT = {aten.contiguous.default}


class DiffersError(Exception):
    """The graphs of the two modes differ in what they do, not only in flags."""


@dataclass(frozen=True)
class Version:
    """A graph, the dtype of the parameters where it has been written into the graph, and tensors
    that the graph reads and the model does not have."""

    graph: fx.Graph
    dtype: torch.dtype | None = None
    constants: dict[str, Tensor] = field(default_factory=dict)


def merge(evaluated: Version, trained: Version, typical: str = "") -> fx.Graph:
    """One graph for both modes; `typical`: the name of a parameter that has the versions' dtype.

    Raises `DiffersError` where the ops of the two modes are not the same.
    """
    return _Merge(evaluated, trained, typical).run()


def _opcodes(a: list[Any], b: list[Any]) -> Sequence[tuple[str, int, int, int, int]]:
    """What `difflib` says of two sequences, which takes its time for what repeats itself."""
    if a == b:
        return [("equal", 0, len(a), 0, len(b))]
    return difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()


@dataclass
class _Merge:
    evaluated: Version
    trained: Version
    typical: str
    graph: fx.Graph = field(default_factory=fx.Graph)
    left: dict[fx.Node, fx.Node] = field(default_factory=dict)
    right: dict[fx.Node, fx.Node] = field(default_factory=dict)
    copies: dict[fx.Node, fx.Node] = field(default_factory=dict)  # of a layout -> of what
    flags: dict[str, fx.Node] = field(default_factory=dict)
    dtype: fx.Node | None = None

    def run(self) -> fx.Graph:
        a, b = list(self.evaluated.graph.nodes), list(self.trained.graph.nodes)
        for kind, i, i_end, j, j_end in _opcodes(_keys(a), _keys(b)):
            if kind == "equal":
                for e, t in zip(a[i:i_end], b[j:j_end], strict=True):
                    self._both(e, t)
                continue
            for n in a[i:i_end]:
                self._one(n, self.left, "eval")
            for n in b[j:j_end]:
                self._one(n, self.right, "train")
        return self.graph

    def _one(self, n: fx.Node, env: dict[fx.Node, fx.Node], mode: str) -> None:
        """A node of one graph alone."""
        if not isinstance(n.meta.get("val", Tensor()), Tensor) and n.op == "call_function":
            env[n] = self.graph.node_copy(n, env.__getitem__)  # a size, which the other one knows
            return
        if n.target not in _LAYOUT:
            raise DiffersError(f"{n.target} runs in {mode} mode only, at {n.meta['source']}")
        env[n] = self.graph.node_copy(n, env.__getitem__)
        self.copies[env[n]] = env[n].all_input_nodes[0]

    def _both(self, e: fx.Node, t: fx.Node) -> None:
        (e_args, t_args), (e_kwargs, t_kwargs) = _aligned(e, t)
        args = self._pair(e_args, t_args, t)
        kwargs = self._pair(e_kwargs, t_kwargs, t)
        one, other = (
            v.constants.get(str(n.target)) for v, n in ((self.evaluated, e), (self.trained, t))
        )
        if one is not None and other is not None and not torch.equal(one.to(other), other):
            raise DiffersError(f"a constant at {t.meta['source']} is another one in train mode")
        made = self.graph.create_node(t.op, t.target, args, kwargs, t.name)
        made.meta = dict(t.meta)
        self.left[e] = self.right[t] = made

    def _pair(self, e: Any, t: Any, user: fx.Node) -> Any:
        """One argument out of two."""
        if isinstance(e, fx.Node) and isinstance(t, fx.Node):
            return self._node(e, t, user)
        if isinstance(e, fx.Node) and _size(e) == t:
            return self.left[e]
        if isinstance(t, fx.Node) and _size(t) == e:
            return self.right[t]
        if isinstance(e, (list, tuple)) and isinstance(t, (list, tuple)) and len(e) == len(t):
            return type(e)(self._pair(x, y, user) for x, y in zip(e, t, strict=True))
        if isinstance(e, dict) and isinstance(t, dict) and e.keys() == t.keys():
            return {k: self._pair(e[k], t[k], user) for k in e}
        if isinstance(e, slice) and isinstance(t, slice):
            ends = ((e.start, t.start), (e.stop, t.stop), (e.step, t.step))
            return slice(*(self._pair(x, y, user) for x, y in ends))
        if type(e) is type(t) and e == t:
            return e
        if isinstance(e, torch.dtype) and (e, t) == (self.evaluated.dtype, self.trained.dtype):
            return self._dtype(user)
        if isinstance(e, float) and isinstance(t, float):
            limit = _limit(e, t, self.evaluated.dtype, self.trained.dtype)
            if limit is not None:
                info = self._made(torch.finfo, (self._dtype(user),), user)
                return self._made(getattr, (info, limit), user)
        if isinstance(e, (bool, int, float)) and isinstance(t, (bool, int, float)):
            return self._by_mode(e, t, user)
        raise DiffersError(f"{user.target} takes {t} instead of {e} in train mode")

    def _node(self, e: fx.Node, t: fx.Node, user: fx.Node) -> fx.Node:
        """The node that stands for both: the copy, if one mode copies; what is cast, if the cast
        changes nothing in one dtype (its result is then known by the name of the cast)."""
        left, right = self.left[e], self.right[t]
        for one, other in ((left, right), (right, left)):
            copied: fx.Node | None = one
            while copied is not None:
                if copied is other:
                    return one
                copied = self.copies.get(copied)
        casts = {self.right[n] for n in _uncast(t)}
        for n in _uncast(e):
            if self.left[n] in casts:
                return self.left[n]
        raise DiffersError(f"{user.target} at {user.meta['source']} takes another input")

    def _by_mode(self, e: Any, t: Any, user: fx.Node) -> fx.Node:
        path = user.meta["module"][0]
        if path not in self.flags:
            self.flags[path] = self._read(f"{path}.training".lstrip("."), user)
        flag = self.flags[path]
        if (e, t) == (False, True) and type(e) is bool:
            return flag
        if e == 0 and isinstance(t, float):
            return self._made(operator.mul, (t, flag), user)
        return self._made(operator.getitem, ((e, t), flag), user)

    def _dtype(self, user: fx.Node) -> fx.Node:
        """The dtype of the parameters, as a node."""
        if self.dtype is None:
            self.dtype = self._made(getattr, (self._read(self.typical, user), "dtype"), user)
        return self.dtype

    def _read(self, target: str, user: fx.Node) -> fx.Node:
        node = self.graph.get_attr(target)
        node.meta["source"] = user.meta["source"]
        return node

    def _made(self, function: Any, args: tuple[Any, ...], user: fx.Node) -> fx.Node:
        node = self.graph.call_function(function, args)
        node.meta["source"] = user.meta["source"]
        return node


def _uncast(node: fx.Node) -> Iterator[fx.Node]:
    """A node, and what it is the same tensor as: operands of casts to the type they have."""
    yield node
    while getattr(node.target, "_opname", "") == "to":
        operand: Any = node.args[0]
        if operand.meta["val"].dtype != node.meta["val"].dtype:
            return
        node = operand
        yield node


def _size(node: fx.Node) -> int | float | None:
    """The number that a size was when the graph was made, None for anything else."""
    value = node.meta.get("val")
    return value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat)) else None


def _keys(nodes: list[fx.Node]) -> list[tuple[Any, ...]]:
    """What nodes of two graphs must have in common to be taken for one."""
    return [(n.op, n.target if n.op != "output" else "", n.meta.get("module")) for n in nodes]


def _aligned(e: fx.Node, t: fx.Node) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Arguments of two calls of one function, with the defaults that one of them left out."""
    left, right = [(list(n.args), dict(n.kwargs)) for n in (e, t)]
    schema = getattr(t.target, "_schema", None)
    for k, argument in enumerate(schema.arguments if schema is not None else ()):
        for (args, kwargs), (other, named) in ((left, right), (right, left)):
            if len(args) == k < len(other):
                args.append(kwargs.pop(argument.name, argument.default_value))
            elif argument.name in named and argument.name not in kwargs and len(args) <= k:
                kwargs[argument.name] = argument.default_value
    return (tuple(left[0]), tuple(right[0])), (left[1], right[1])


def _limit(e: float, t: float, left: torch.dtype | None, right: torch.dtype | None) -> str | None:
    """The name of the `torch.finfo` limit that two numbers are, each of its dtype."""
    if left is None or right is None or left == right:
        return None
    low, high = torch.finfo(left), torch.finfo(right)
    for name in ("min", "max", "eps", "tiny"):
        if (e, t) == (getattr(low, name), getattr(high, name)):
            return name
    return None

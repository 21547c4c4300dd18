"""What a forward keeps for the next call on the same sizes, and makes anew on others:
`if self.size != x.shape: self.size, self.grid = ...`.

The graph makes it at each call: so it fits inputs of any size, and it makes no difference whether
the module was called before, and on what.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import operator
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from demp_fx.tracing.checks import passing

# How code asks whether the sizes are others than they were; and what it hears if they always are.
ASKS = {operator.ne: True, operator.eq: False}

Memo = tuple[nn.Module, str]  # a module, and its attribute that holds the sizes of the last call


def memo_of(node: fx.Node, frame: types.FrameType) -> Memo | None:
    """The attribute that `node` compares with sizes, if what asks for it is in a method of a module
    that writes to it as well, and does more about it than to raise."""
    plain = [a for a in node.args if not isinstance(a, fx.Node)]
    code = frame.f_code
    owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    if len(plain) != 1 or not isinstance(owner, nn.Module) or passing(frame) is not None:
        return None
    kind: Any = type(owner)
    named = (name for name in _written(kind) if _holds(owner, name, plain[0]))
    return next(((owner, name) for name in named), None)


def is_made_anew(memo: Memo) -> bool:
    """Whether the forward that was traced has put sizes of its own into the attribute."""
    owner, name = memo
    held = vars(owner).get(name)
    return any(issubclass(type(size), fx.Proxy) for size in pytree.tree_leaves(held))


@contextlib.contextmanager
def forgotten(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Meanwhile `model` is as if it had never been called: what it has kept in another precision,
    or on another device, would not be what it makes now."""
    before, modules = [], dict(model.named_modules())
    for name in names:
        path, _, attribute = name.rpartition(".")
        table: dict[str, Any] = modules[path].__dict__ if path in modules else {}
        if attribute in table:
            before.append((table, attribute, table[attribute]))
            table[attribute] = _of_no_input(table[attribute])
    try:
        yield
    finally:
        for table, attribute, held in before:
            table[attribute] = held


def _of_no_input(held: Any) -> Any:
    """Sizes that none is equal to."""
    if isinstance(held, (tuple, list)):
        sizes = map(_of_no_input, held)
        return type(held)(*sizes) if hasattr(held, "_fields") else type(held)(sizes)
    return -1 if type(held) is int else held


def is_size(value: Any) -> bool:
    """Whether it is a size, or all sizes of a tensor."""
    return type(value) in (int, torch.Size)


def _holds(owner: nn.Module, name: str, value: Any) -> bool:
    held = getattr(owner, name, owner)
    if held is None or isinstance(value, (tuple, list)):
        return held is value or (isinstance(held, (tuple, list)) and [*held] == [*value])
    return any(type(size) is int and size == value for size in pytree.tree_leaves(held))


@functools.lru_cache(maxsize=64)
def _written(kind: Any) -> list[str]:
    """The names of attributes that methods of a class write to, once it is made."""
    methods = [
        method
        for base in kind.__mro__[: kind.__mro__.index(nn.Module)]
        for name, method in vars(base).items()
        if isinstance(method, types.FunctionType) and name != "__init__"
    ]
    found = (i for method in methods for i in dis.get_instructions(method))
    return list(dict.fromkeys(i.argval for i in found if i.opname == "STORE_ATTR"))

"""What the tables of sizes ask: which indices of a dim stay, and what a number that the code works
out of sizes will be.

Sizes that the code asks of a tensor (`x.shape[1]`) follow by themselves where they are used as
sizes, and keep their old value where they are used as numbers (`head_dim ** -0.5`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from demp_fx.calls import ASKS, COUNTS, called
from demp_fx.errors import DempError
from demp_fx.passes.plan import Literal

Masks = dict[int, Tensor]


class MisfitError(DempError):
    """Nodes whose code does not take the sizes that their values would get."""

    def __init__(self, *nodes: fx.Node) -> None:
        super().__init__(f"{', '.join(n.name for n in nodes)} cannot be narrowed so")
        self.nodes = nodes


@dataclass(frozen=True)
class Sizes:
    """What a row may ask: the example value of a node, and which indices of its dims stay.

    `seen`: the same of an input, as a node gets it (behind a cut, say). `ragged`: for dims on which
    other indices stay in each block, though as many of them, the masks of all blocks. `merged`:
    dims that hold the channels together with something else, such as the batch. `varies`: whether a
    number is worked out of a size of the input. `changed`: nodes that hold sizes which change.
    """

    env: Mapping[fx.Node, Any]
    masks: Callable[[fx.Node], Masks]
    seen: Callable[[fx.Node, fx.Node], Masks]
    ragged: Callable[[fx.Node], Masks]
    merged: Callable[[fx.Node], set[int]]
    varies: Callable[[fx.Node], bool]
    changed: set[fx.Node] = field(default_factory=set)
    _new: dict[fx.Node, dict[int, int]] = field(default_factory=dict)
    _followed: dict[fx.Node, Any] = field(default_factory=dict)

    def new(self, node: fx.Node) -> dict[int, int]:
        """The new size of each dim of a node's value that gets narrower."""
        if node not in self._new:
            self._new[node] = {d: int(mask.sum()) for d, mask in self.masks(node).items()}
        return self._new[node]

    def number(self, given: Any) -> Any:
        """An argument, or the example value of the node that computes it (`x.shape[1] // 2`)."""
        return self.env.get(given) if isinstance(given, fx.Node) else given

    def follows(self, given: Any) -> Any:
        """What an argument will be in the narrow graph, where that is worked out of sizes; None
        where nobody can tell."""
        if not isinstance(given, fx.Node):
            return given
        if given not in self._followed:  # a size may be in many others
            self._followed[given] = self._worked_out(given)
        return self._followed[given]

    def _worked_out(self, given: fx.Node) -> Any:
        if called(given) in ASKS | COUNTS and given.args and isinstance(given.args[0], fx.Node):
            return self._asked(given)
        arguments = [self.follows(a) for a in given.args]
        if given.op != "call_function" or given.kwargs or any(a is None for a in arguments):
            return None
        if all(isinstance(a, (int, float, slice, tuple)) for a in arguments):
            with suppress(ZeroDivisionError):  # `width // (channels // 8)` of fewer than 8
                return given.target(*arguments)  # type: ignore[operator]
        return None

    def _asked(self, node: fx.Node) -> Any:
        """`x.shape`, `x.size()`, `x.size(d)` or `x.numel()` of the narrow x, or `shape.numel()`."""
        source, *rest = node.args
        assert isinstance(source, fx.Node)
        if not isinstance(self.env[source], Tensor):
            shape = self.follows(source) if called(node) in COUNTS else None
            return math.prod(shape) if isinstance(shape, tuple) else None
        new = self.new(source)
        shape = tuple(new.get(d, n) for d, n in enumerate(self.env[source].shape))
        if called(node) in COUNTS:
            return math.prod(shape)
        if node.target is getattr:
            return shape if rest == ["shape"] else None
        dim = rest[0] if rest else node.kwargs.get("dim")
        return shape if dim is None else shape[dim] if isinstance(dim, int) else None

    def cut(self, node: fx.Node, source: fx.Node, dim: int, *ends: int) -> Tensor | None:
        """Which indices of a dim of `source` stay, to tell where `node` cuts it: at `ends`, before
        each of which as many must stay in one block as in another."""
        dim %= self.env[source].dim()
        blocks = self.ragged(source).get(dim)
        if blocks is not None:
            for end in ends:
                counts = blocks[:, :end].sum(1)
                if int(counts.min()) != int(counts.max()):
                    raise MisfitError(node)
        return self.seen(node, source).get(dim)


Row = Callable[[fx.Node, Sizes], Iterator[Literal]]


def argument(node: fx.Node, position: int, name: str, default: Any) -> tuple[list[int | str], Any]:
    """Where an argument stands that may be given by position or by name, and what it is."""
    if len(node.args) > position:
        return ["args", position], node.args[position]
    return ["kwargs", name], node.kwargs.get(name, default)

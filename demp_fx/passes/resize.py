"""Sizes that the code of a node names: which of its arguments they are, and what they become.

One row for each way of writing a size: `view(b, 64, -1)`, `split(x, 32)`, `x[:, :32]`, `chunk`.
Sizes that the code asks of a tensor (`x.shape[1]`) follow by themselves where they are used as
sizes, and keep their old value where they are used as numbers (`head_dim ** -0.5`).
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from demp_fx.calls import ASKS, COUNTS, MADE, MADE_LIKE, called
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


def literals(node: fx.Node, sizes: Sizes) -> list[Literal]:
    """The arguments of a node that must change, none where no row knows of any."""
    row = ROWS.get(called(node))
    return list(row(node, sizes)) if row is not None else []


def _shape(node: fx.Node, sizes: Sizes, first: int = 1, inferred: bool = True) -> Iterator[Literal]:
    """`view(x, *shape)`, `reshape(x, shape)`: each entry is a size of the result; they stand from
    the `first` argument on. `inferred`: one of them may be left to torch."""
    new = sizes.new(node)
    if not new and not sizes.changed:
        return
    path, given = _variadic(node, "shape", "size", first=first)
    shape = sizes.env[node].shape
    if len(given) != len(shape):
        return
    asked = {d for d, size in enumerate(given) if isinstance(size, fx.Node)}
    changes = {
        d: new.get(d, shape[d])
        for d, size in enumerate(given)
        # a size of another tensor may change where this one does not
        if (d in new or (d in asked and size in sizes.changed))
        and sizes.follows(size) not in (-1, new.get(d, shape[d]))
    }
    # where the batch, or another size of the input, is in it, torch works it out
    merged = sizes.merged(node) if changes else set()
    merged |= {d for d in asked & changes.keys() & new.keys() if sizes.varies(given[d])}
    free = merged | (asked & changes.keys() - new.keys())
    if inferred and len(free) == 1 and -1 not in given:
        changes |= dict.fromkeys(free & changes.keys(), -1)
    for d, n in changes.items():
        computed = d in merged & asked and n != -1
        before = sizes.follows(given[d]) if computed else None
        if computed and before is None:
            raise MisfitError(node)  # nobody can tell how the batch is in it
        yield Literal(node=node.name, path=[*path(d)], value=n, of=before)


def _made(node: fx.Node, sizes: Sizes) -> Iterator[Literal]:
    """`torch.zeros(*shape)`, `torch.full(shape, 1.0)`."""
    return _shape(node, sizes, first=0, inferred=False)


def _made_like(node: fx.Node, sizes: Sizes) -> Iterator[Literal]:
    """`x.new_zeros(*shape)`, `x.expand(*shape)`."""
    return _shape(node, sizes, inferred=False)


def _pad(node: fx.Node, sizes: Sizes) -> Iterator[Literal]:
    """`F.pad(x, (0, 0, 0, 0, 2, 2))`: as many channels are padded on as stay."""
    path, given = _variadic(node, "pad")
    if any(not isinstance(sizes.number(amount), int) for amount in given):
        return
    rank, masks = sizes.env[node].dim(), sizes.masks(node)
    for k, amount in enumerate(given):
        mask, width = masks.get(rank - 1 - k // 2), sizes.number(amount)
        if mask is not None:
            padded = mask[:width] if k % 2 == 0 else mask[mask.numel() - width :]
            kept = int(padded.sum())
            if sizes.follows(amount) != kept:
                yield Literal(node=node.name, path=[*path(k)], value=kept)


def _variadic(
    node: fx.Node, *names: str, first: int = 1
) -> tuple[Callable[[int], list[int | str]], tuple[Any, ...]]:
    """Where a list of ints stands that may also be written as separate arguments."""
    named = next((name for name in names if name in node.kwargs), None)
    if named is not None:
        listed: Any = node.kwargs[named]
        return (lambda d: ["kwargs", named, d]), tuple(listed)
    listed = node.args[first] if len(node.args) > first else None
    if isinstance(listed, (list, tuple)):
        return (lambda d: ["args", first, d]), tuple(listed)
    return (lambda d: ["args", d + first]), tuple(node.args[first:])


def _argument(node: fx.Node, position: int, name: str, default: Any) -> tuple[list[int | str], Any]:
    if len(node.args) > position:
        return ["args", position], node.args[position]
    return ["kwargs", name], node.kwargs.get(name, default)


def _pieces(node: fx.Node, sizes: Sizes, dim: Any) -> list[int] | None:
    """The new sizes of the pieces of a split, or None where they stay."""
    lengths = [piece.size(dim) for piece in sizes.env[node]]
    mask = sizes.cut(node, node.all_input_nodes[0], dim, *itertools.accumulate(lengths))
    if mask is None:
        return None
    return [int(part.sum()) for part in mask.split(lengths)]


def _split(node: fx.Node, sizes: Sizes) -> Iterator[Literal]:
    _, dim = _argument(node, 2, "dim", 0)
    pieces = _pieces(node, sizes, dim)
    if pieces is not None:
        name = "split_sizes" if "split_sizes" in node.kwargs else "split_size"
        name = "split_size_or_sections" if "split_size_or_sections" in node.kwargs else name
        path, given = _argument(node, 1, name, None)
        if isinstance(given, (list, tuple)):
            for k, (asked, piece) in enumerate(zip(given, pieces, strict=True)):
                if sizes.follows(asked) != piece:
                    yield Literal(node=node.name, path=[*path, k], value=piece)
            return
        even = len({*pieces[:-1]}) == 1 and 0 < pieces[-1] <= pieces[0]
        size = pieces[0] if even and isinstance(sizes.number(given), int) else pieces
        yield Literal(node=node.name, path=path, value=size)


def _chunk(node: fx.Node, sizes: Sizes) -> Iterator[Literal]:
    """Equal chunks become a split: the pieces may now differ."""
    _, dim = _argument(node, 2, "dim", 0)
    pieces = _pieces(node, sizes, dim)
    if pieces is not None:
        yield Literal(node=node.name, path=["args", 1], value=pieces, target="split")


def _getitem(node: fx.Node, sizes: Sizes) -> Iterator[Literal]:
    """`x[:, a:b]`, read or written: the survivors of a run are a run among the survivors."""
    source, index = node.args[:2]
    if not isinstance(source, fx.Node) or not isinstance(sizes.env[source], Tensor):
        return
    masks = sizes.seen(node, source)
    if not masks and not sizes.changed:
        return
    entries = index if isinstance(index, tuple) else (index,)
    taken = sum(1 for e in entries if e is not None and e is not Ellipsis)
    dim = 0
    for k, entry in enumerate(entries):
        if entry is None:
            continue
        if entry is Ellipsis:
            dim += sizes.env[source].dim() - taken
            continue
        path: list[int | str] = ["args", 1, k] if isinstance(index, tuple) else ["args", 1]
        mask = masks.get(dim)
        named = (entry.start, entry.stop) if isinstance(entry, slice) else (entry,)
        if mask is None and any(isinstance(e, fx.Node) and e in sizes.changed for e in named):
            if any(isinstance(e, fx.Node) and sizes.varies(e) for e in named):
                raise MisfitError(node)  # it is as before for the example's input alone
            mask = torch.ones(sizes.env[source].size(dim), dtype=torch.bool)  # as before
        whole = isinstance(entry, slice) and entry == slice(None)
        if mask is not None and isinstance(entry, slice) and not whole:
            ends = (sizes.number(end) for end in (entry.start, entry.stop, entry.step))
            start, stop, step = slice(*ends).indices(mask.numel())
            sizes.cut(node, source, dim, start, stop)
            span = (int(mask[:start].sum()), int(mask[:stop].sum()), step)
            if not _follows(entry, span, int(mask.sum()), sizes):
                left, right = (
                    _as_written(*end)
                    for end in ((entry.start, mask, start), (entry.stop, mask, stop))
                )
                yield Literal(node=node.name, path=path, value=[left, right, step], slice=True)
        elif mask is not None and isinstance(sizes.number(entry), int):
            place = sizes.number(entry) % mask.numel()
            sizes.cut(node, source, dim, place, place + 1)
            yield Literal(node=node.name, path=path, value=_as_written(entry, mask, place))
        dim += 1


def _follows(entry: slice, span: tuple[int, int, int], size: int, sizes: Sizes) -> bool:
    """Whether the ends of a slice that are asked of tensors are what they should be, by
    themselves."""
    ends = (entry.start, entry.stop, entry.step)
    if not any(isinstance(end, fx.Node) for end in ends):
        return False
    found = [sizes.follows(end) for end in ends]
    unknown = any(new is None and end is not None for new, end in zip(found, ends, strict=True))
    return not unknown and slice(*found).indices(size) == span


def _as_written(end: Any, mask: Tensor, place: int) -> Any:
    """The new number in the place of an index, or of an end of a slice. What is left out, or is
    counted from behind, stays so, whatever the channels are merged with."""
    if end is None:
        return None
    kept = _place(mask, place) if place < mask.numel() else int(mask.sum())
    behind = int(mask.sum()) - kept
    return -behind if isinstance(end, int) and end < 0 and behind else kept


def _place(mask: Tensor, index: int) -> int:
    return int(mask[: index % mask.numel()].sum())


def _narrow(node: fx.Node, sizes: Sizes) -> Iterator[Literal]:
    source = node.all_input_nodes[0]
    _, dim = _argument(node, 1, "dim", 0)
    mask = sizes.seen(node, source).get(dim % sizes.env[source].dim())
    if mask is not None:
        (place, start), (extent, length) = (
            _argument(node, 2, "start", 0), _argument(node, 3, "length", 0)
        )  # fmt: skip
        start, length = sizes.number(start) % mask.numel(), sizes.number(length)
        sizes.cut(node, source, dim, start, start + length)
        yield Literal(node=node.name, path=place, value=_place(mask, start))
        kept = int(mask[start : start + length].sum())
        yield Literal(node=node.name, path=extent, value=kept)


def _select(node: fx.Node, sizes: Sizes) -> Iterator[Literal]:
    source = node.all_input_nodes[0]
    _, dim = _argument(node, 1, "dim", 0)
    mask = sizes.seen(node, source).get(dim % sizes.env[source].dim())
    if mask is not None:
        path, index = _argument(node, 2, "index", 0)
        place = sizes.number(index) % mask.numel()
        sizes.cut(node, source, dim, place, place + 1)
        yield Literal(node=node.name, path=path, value=_as_written(index, mask, place))


def _unflatten(node: fx.Node, sizes: Sizes) -> Iterator[Literal]:
    """`unflatten(x, dim, sizes)`: a list of some of the sizes of the result."""
    new = sizes.new(node)
    _, dim = _argument(node, 1, "dim", 0)
    _, given = _argument(node, 2, "sizes", ())
    if isinstance(given, fx.Node):
        return
    source: Any = node.args[0]
    first = dim % sizes.env[source].dim()
    path: list[int | str] = ["args", 2] if len(node.args) > 2 else ["kwargs", "sizes"]
    for k, size in enumerate(given):
        if first + k in new and size not in (-1, new[first + k]):
            yield Literal(node=node.name, path=[*path, k], value=new[first + k])


def _groups(node: fx.Node, sizes: Sizes) -> Iterator[Literal]:
    """A functional grouped convolution: as many groups as have channels left."""
    yield from _alive(node, sizes, *_argument(node, 6, "groups", 1))


def _norm_groups(node: fx.Node, sizes: Sizes) -> Iterator[Literal]:
    """A functional group norm: likewise."""
    yield from _alive(node, sizes, *_argument(node, 1, "num_groups", 1))


def _alive(node: fx.Node, sizes: Sizes, path: list[int | str], given: Any) -> Iterator[Literal]:
    groups, mask = sizes.number(given), sizes.seen(node, node.all_input_nodes[0]).get(1)
    if groups != 1 and (mask is not None or given in sizes.changed):
        alive = groups if mask is None else int(mask.reshape(groups, -1).any(1).sum())
        follows = sizes.follows(given)
        if follows is None:
            raise MisfitError(node)
        if alive != follows:  # where they are computed, the batch may be in them
            of = follows if isinstance(given, fx.Node) else None
            yield Literal(node=node.name, path=path, value=alive, of=of)


def _attention(node: fx.Node, sizes: Sizes) -> Iterator[Literal]:
    """Its default scale is that of the width that the heads had."""
    query = node.args[0]
    if not isinstance(query, fx.Node) or node.kwargs.get("scale") is not None:
        return
    rank, width = sizes.env[query].dim(), sizes.env[query].size(-1)
    if rank - 1 in sizes.seen(node, query):
        yield Literal(node=node.name, path=["kwargs", "scale"], value=float(width) ** -0.5)


def _slice(node: fx.Node, sizes: Sizes) -> Iterator[Literal]:
    """`aten.slice(x, dim, start, end)`: `x[:, a:b]` as torch.export writes it."""
    source = node.all_input_nodes[0]
    _, dim = _argument(node, 1, "dim", 0)
    if sizes.env[source].size(dim) == sizes.env[node].size(dim):
        return
    mask = sizes.seen(node, source).get(dim % sizes.env[source].dim())
    for position, name in ((2, "start"), (3, "end")):
        path, bound = _argument(node, position, name, None)
        if mask is not None and isinstance(bound, int):
            end = slice(bound).indices(mask.numel())[1]
            sizes.cut(node, source, dim, end)
            place = int(mask[:end].sum())
            yield Literal(node=node.name, path=path, value=place)


def _split_evenly(node: fx.Node, sizes: Sizes) -> Iterator[Literal]:
    """Equal pieces of a given size: they may now differ."""
    for literal in _split(node, sizes):
        yield literal.model_copy(update={"target": "split"})


F = torch.nn.functional
aten = torch.ops.aten
ROWS: dict[Any, Row] = {
    **dict.fromkeys(("view", "reshape", torch.reshape), _shape),
    **dict.fromkeys(MADE, _made),
    **dict.fromkeys(MADE_LIKE, _made_like),
    **dict.fromkeys(("split", "split_with_sizes", torch.split, torch.split_with_sizes), _split),
    **dict.fromkeys(("chunk", torch.chunk), _chunk),
    **dict.fromkeys(("narrow", torch.narrow), _narrow),
    **dict.fromkeys(("select", torch.select), _select),
    **dict.fromkeys(("unflatten", torch.unflatten, aten.unflatten.int), _unflatten),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _groups),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _groups),
    **dict.fromkeys((operator.getitem, operator.setitem), _getitem),
    **dict.fromkeys((F.pad, torch._C._nn.pad), _pad),
    **dict.fromkeys((F.group_norm, torch.group_norm, aten.group_norm.default), _norm_groups),
    F.scaled_dot_product_attention: _attention,
    # the same, as torch.export writes them
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten._unsafe_view.default), _shape),
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), _pad),
    aten.split_with_sizes.default: _split,
    aten.split.Tensor: _split_evenly,
    aten.chunk.default: _chunk,
    aten.narrow.default: _narrow,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.scaled_dot_product_attention.default: _attention,
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), _groups),
}
SIZE_ROWS = (_shape, _made, _made_like, _split, _split_evenly, _chunk, _unflatten, _groups,
             _norm_groups)  # fmt: skip
# Targets whose arguments in these rows are sizes: a size of a tensor may be written there as it is.
SIZED = {target for target, row in ROWS.items() if row in SIZE_ROWS}

"""Parts of an axis that code names by sizes, and what they become: `split(x, 32)`, `x[:, :32]`,
`chunk`, `narrow`, `select`. One row for each way of writing it.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from demp_fx.passes.plan import Literal
from demp_fx.passes.sizes import MisfitError, Row, Sizes, argument


def _pieces(node: fx.Node, sizes: Sizes, dim: Any) -> list[int] | None:
    """The new sizes of the pieces of a split, or None where they stay."""
    lengths = [piece.size(dim) for piece in sizes.env[node]]
    mask = sizes.cut(node, node.all_input_nodes[0], dim, *itertools.accumulate(lengths))
    if mask is None:
        return None
    return [int(part.sum()) for part in mask.split(lengths)]


def _split(node: fx.Node, sizes: Sizes) -> Iterator[Literal]:
    _, dim = argument(node, 2, "dim", 0)
    pieces = _pieces(node, sizes, dim)
    if pieces is not None:
        name = "split_sizes" if "split_sizes" in node.kwargs else "split_size"
        name = "split_size_or_sections" if "split_size_or_sections" in node.kwargs else name
        path, given = argument(node, 1, name, None)
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
    _, dim = argument(node, 2, "dim", 0)
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
            asked = (sizes.number(end) for end in (entry.start, entry.stop, entry.step))
            start, stop, step = slice(*asked).indices(mask.numel())
            sizes.cut(node, source, dim, start, stop)
            span = (int(mask[:start].sum()), int(mask[:stop].sum()), step)
            if not _follows(entry, span, int(mask.sum()), sizes):
                left, right = _as_written(entry.start, mask, start), _stop(entry.stop, mask, stop)
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


def _stop(end: Any, mask: Tensor, place: int) -> Any:
    """The same of the end of a slice: of another input there may be more in front of it."""
    if type(end) is int and end < 0 and not bool(mask[place:].any()):
        return None  # what it leaves out is no longer there
    if type(end) is int and end > mask.numel():
        return end - int((~mask).sum())
    return _as_written(end, mask, place)


def _place(mask: Tensor, index: int) -> int:
    return int(mask[: index % mask.numel()].sum())


def _narrow(node: fx.Node, sizes: Sizes) -> Iterator[Literal]:
    source = node.all_input_nodes[0]
    _, dim = argument(node, 1, "dim", 0)
    mask = sizes.seen(node, source).get(dim % sizes.env[source].dim())
    if mask is not None:
        (place, start), (extent, length) = (
            argument(node, 2, "start", 0), argument(node, 3, "length", 0)
        )  # fmt: skip
        start, length = sizes.number(start) % mask.numel(), sizes.number(length)
        sizes.cut(node, source, dim, start, start + length)
        yield Literal(node=node.name, path=place, value=_place(mask, start))
        kept = int(mask[start : start + length].sum())
        yield Literal(node=node.name, path=extent, value=kept)


def _select(node: fx.Node, sizes: Sizes) -> Iterator[Literal]:
    source = node.all_input_nodes[0]
    _, dim = argument(node, 1, "dim", 0)
    mask = sizes.seen(node, source).get(dim % sizes.env[source].dim())
    if mask is not None:
        path, index = argument(node, 2, "index", 0)
        place = sizes.number(index) % mask.numel()
        sizes.cut(node, source, dim, place, place + 1)
        yield Literal(node=node.name, path=path, value=_as_written(index, mask, place))


def _slice(node: fx.Node, sizes: Sizes) -> Iterator[Literal]:
    """`aten.slice(x, dim, start, end)`: `x[:, a:b]` as torch.export writes it."""
    source = node.all_input_nodes[0]
    _, dim = argument(node, 1, "dim", 0)
    if sizes.env[source].size(dim) == sizes.env[node].size(dim):
        return
    mask = sizes.seen(node, source).get(dim % sizes.env[source].dim())
    for position, name in ((2, "start"), (3, "end")):
        path, bound = argument(node, position, name, None)
        if mask is not None and isinstance(bound, int):
            end = slice(bound).indices(mask.numel())[1]
            sizes.cut(node, source, dim, end)
            written = _stop if name == "end" else _as_written
            yield Literal(node=node.name, path=path, value=written(bound, mask, end))


def _split_evenly(node: fx.Node, sizes: Sizes) -> Iterator[Literal]:
    """Equal pieces of a given size: they may now differ."""
    for literal in _split(node, sizes):
        yield literal.model_copy(update={"target": "split"})


aten = torch.ops.aten
# Rows whose arguments are sizes of pieces,
SPLITS: dict[Any, Row] = {
    **dict.fromkeys(("split", "split_with_sizes", torch.split, torch.split_with_sizes), _split),
    **dict.fromkeys(("chunk", torch.chunk), _chunk),
    aten.split_with_sizes.default: _split,
    aten.split.Tensor: _split_evenly,
    aten.chunk.default: _chunk,
}
# and those whose arguments are places on an axis.
PARTS: dict[Any, Row] = {
    **dict.fromkeys(("narrow", torch.narrow, aten.narrow.default), _narrow),
    **dict.fromkeys(("select", torch.select, aten.select.int), _select),
    **dict.fromkeys((operator.getitem, operator.setitem), _getitem),
    aten.slice.Tensor: _slice,
}

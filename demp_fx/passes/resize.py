"""Sizes that the code of a node names: which of its arguments they are, and what they become.

One row for each way of writing a size: `view(b, 64, -1)`, `expand`, `zeros`, `unflatten`, and (in
`slices.py`) parts of an axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from demp_fx.calls import MADE, MADE_LIKE, called
from demp_fx.passes.plan import Literal
from demp_fx.passes.sizes import MisfitError, Row, Sizes, argument
from demp_fx.passes.slices import PARTS, SPLITS


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


def _unflatten(node: fx.Node, sizes: Sizes) -> Iterator[Literal]:
    """`unflatten(x, dim, sizes)`: a list of some of the sizes of the result."""
    new = sizes.new(node)
    _, dim = argument(node, 1, "dim", 0)
    _, given = argument(node, 2, "sizes", ())
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
    yield from _alive(node, sizes, *argument(node, 6, "groups", 1))


def _norm_groups(node: fx.Node, sizes: Sizes) -> Iterator[Literal]:
    """A functional group norm: likewise."""
    yield from _alive(node, sizes, *argument(node, 1, "num_groups", 1))


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


F = torch.nn.functional
aten = torch.ops.aten
# Rows whose arguments are sizes of what they give, or of its blocks,
SHAPES: dict[Any, Row] = {
    **dict.fromkeys(("view", "reshape", torch.reshape), _shape),
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten._unsafe_view.default), _shape),
    **dict.fromkeys(MADE, _made),
    **dict.fromkeys(MADE_LIKE, _made_like),
    **dict.fromkeys(("unflatten", torch.unflatten, aten.unflatten.int), _unflatten),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _groups),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _groups),
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), _groups),
    **dict.fromkeys((F.group_norm, torch.group_norm, aten.group_norm.default), _norm_groups),
}
# and all of them.
ROWS: dict[Any, Row] = {
    **SHAPES,
    **SPLITS,
    **PARTS,
    **dict.fromkeys(
        (F.pad, torch._C._nn.pad, aten.pad.default, aten.constant_pad_nd.default), _pad
    ),
    **dict.fromkeys(
        (F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default), _attention
    ),
}
SIZED = {*SHAPES, *SPLITS}  # there, a size of a tensor may be written as it is

"""What is known of a contraction's result: zeros and constants, from its weights and its input."""

from __future__ import annotations

import torch
from torch import Tensor

from demp_fx.channels.constraints import Read
from demp_fx.channels.facts import Facts
from demp_fx.channels.rules.operand import Operand
from demp_fx.channels.stream import Stream


def constants(
    walk: Stream, a: Operand, b: Operand, result: str, bias: Tensor | None, padded: bool,
    read: Read | None,
) -> Facts | None:  # fmt: skip
    """Outputs that depend on constants only: their weights on every unknown input are zero."""
    found = _computed(walk, a, b, result, bias, padded, read)
    if bias is None and not padded and _tells_rows(walk, a, result):
        empty = _annihilated(walk, (a,), result)
        found = found if empty is None else empty.under(found)
    for one, other in ((a, b), (b, a)) if bias is None and not padded else ():
        average = _averaged(walk, one, other, result)
        found = found if average is None else average.under(found)
    return found


def _tells_rows(walk: Stream, a: Operand, result: str) -> bool:
    """Whether something is known of single rows of the data: of channels that lie across what is
    summed."""
    facts = walk.value(a.tensor).facts
    if facts is None or "*" in result:
        return False
    sizes = facts.aligned(len(a.letters)).known.shape
    return any(n > 1 and x in result for n, x in zip(sizes, a.letters, strict=True))


def _averaged(walk: Stream, a: Operand, b: Operand, result: str) -> Facts | None:
    """Constants of `b` that do not vary along the summed dim, where `a` holds shares along it.

    A kernel of several taps adds several averages up, and what it does to space no letter tells.
    """
    facts, shares = walk.value(b.tensor).facts, walk.value(a.tensor).shares
    if facts is None or shares is None or (summed := a.letters[shares]) in result:
        return None
    space = [d for d, x in enumerate(b.letters) if x not in result and x != summed]
    sizes = [b.tensor.size(d) for d in space]
    sizes += [n for n, x in zip(a.tensor.shape, a.letters, strict=True) if x == "*"]
    if summed not in b.letters or any(n > 1 for n in sizes):
        return None
    facts = facts.aligned(len(b.letters))
    first = facts.map(lambda t: t.narrow(b.dim(summed), 0, 1))
    flat = first.flat & (facts.flat & (facts.values == first.values).all(0)).all(
        b.dim(summed), keepdim=True
    )
    order = [b.dim(x) for x in result if x in b.letters] + [b.dim(summed), *space]

    def placed(t: Tensor) -> Tensor:
        sizes = iter(t.permute(order).shape)
        return t.permute(order).reshape([next(sizes) if x in b.letters else 1 for x in result])

    known = placed(flat)
    return Facts.of(known, torch.stack([placed(first.values[mode]) for mode in (0, 1)]))


def _computed(
    walk: Stream, a: Operand, b: Operand, result: str, bias: Tensor | None, padded: bool,
    read: Read | None,
) -> Facts | None:  # fmt: skip
    summed = next(iter((set(a.letters) & set(b.letters)) - set(result)), None)
    kept = next((x for x in b.letters if x in result and x not in a.letters), None)
    weight = walk.value(b.tensor).data
    if weight is None and summed is not None and bias is None:
        return _annihilated(walk, (a, b), result)
    if weight is None and kept is not None:
        return _silent_filters(walk, b, kept, result, bias)
    if summed is None or kept is None or weight is None or weight.is_meta:
        return None
    letters = b.letters
    for x in b.letters:
        if x in a.letters and x in result:  # a batch: one weight for all of it?
            if weight.stride(letters.find(x)) != 0 and weight.size(letters.find(x)) > 1:
                return _annihilated(walk, (a, b), result) if bias is None else None
            weight, letters = weight.select(letters.find(x), 0), letters.replace(x, "")
    weight = weight.movedim((letters.find(kept), letters.find(summed)), (0, 1))
    size = weight.size(1)
    before = walk.value(a.tensor).facts if read is None else read.facts
    if before is not None and read is None:
        before = before.along(a.letters.find(summed), size)
    offset = offset_of(walk, bias, weight.size(0))
    facts = outputs_known(weight, _empty_rows(walk, b, kept), before, offset, padded)
    return None if facts is None else facts.spread(len(result), result.find(kept))


def _empty_rows(walk: Stream, b: Operand, kept: str) -> Tensor | None:
    """The filters of a weight that are known to be zero; None where none is."""
    facts = walk.value(b.tensor).facts
    if facts is None:
        return None
    zero = facts.aligned(len(b.letters)).zero.movedim(b.dim(kept), 0).flatten(1).all(1)
    return zero.expand(b.tensor.size(b.dim(kept))) if bool(zero.any()) else None


def _silent_filters(
    walk: Stream, b: Operand, kept: str, result: str, bias: Tensor | None
) -> Facts | None:
    """Filters of a computed weight that are known to be zero: their outputs are the bias."""
    zero, offset = _empty_rows(walk, b, kept), offset_of(walk, bias, b.tensor.size(b.dim(kept)))
    if zero is None or offset is None:
        return None
    found = Facts.of(zero, offset.expand(2, -1))
    return None if found is None else found.spread(len(result), result.find(kept))


def _annihilated(walk: Stream, operands: tuple[Operand, ...], result: str) -> Facts | None:
    """Zeros of a product of blocks: where one of them is zero all along the summed dim."""
    found: Tensor | None = None
    for operand in operands:
        value = walk.value(operand.tensor)
        if value.data is not None and value.data.layout is torch.strided and not value.data.is_meta:
            zero = (value.data == 0).cpu()
        elif value.facts is not None:
            zero = value.facts.aligned(len(operand.letters)).zero
        else:
            continue
        rest = [d for d, x in enumerate(operand.letters) if x not in result]
        for d in rest:  # the summed dim, and those of a kernel
            zero = zero.all(d, keepdim=True)
        if bool(zero.any()):
            order = [operand.dim(x) for x in result if x in operand.letters]
            shape = iter(zero.permute(*order, *rest).shape)
            zero = zero.permute(*order, *rest).reshape(
                [next(shape) if x in operand.letters else 1 for x in result]
            )
            found = zero if found is None else found | zero
    if found is None:
        return None
    return Facts.of(found, torch.zeros((2, *found.shape), dtype=torch.float64))


def zero_at(facts: Facts, label: Tensor) -> Tensor:
    """Where the slices that a label marks are known to be zero: a mask of the label's shape."""
    zero = facts.aligned(label.dim()).zero
    for d in range(label.dim()):
        if zero.size(d) > 1 and label.size(d) == 1:
            zero = zero.all(d, keepdim=True)
    return zero.expand(label.shape)


def offset_of(walk: Stream, bias: Tensor | None, size: int) -> Tensor | None:
    """The numbers of a bias; nan where they are not known."""
    if bias is None:
        return torch.zeros(size, dtype=torch.float64)
    facts = walk.value(bias).facts
    if facts is None or facts.known.dim() != 1:
        return None
    return torch.where(facts.known, facts.values[0], torch.nan).expand(size)


def outputs_known(
    weight: Tensor, empty: Tensor | None, before: Facts | None, offset: Tensor | None, padded: bool
) -> Facts | None:
    """Facts of `weight` (out, in, *kernel), of which the rows `empty` are zero, applied to channels
    with facts `before` (1-D)."""
    if offset is None:
        return None
    known = torch.zeros(weight.size(1), dtype=torch.bool) if before is None else before.known
    silent = torch.zeros(weight.size(0), dtype=torch.bool) if empty is None else empty
    blind = (~known).nonzero().reshape(-1).to(weight.device)
    maybe = ~silent  # of the others everything is known already
    if blind.numel():
        for k in (blind[0], blind[-1]):
            column = weight.select(1, int(k))
            maybe &= ((column.flatten(1)[:, 0] if column.dim() > 1 else column) == 0).cpu()
    candidates = maybe.nonzero().reshape(-1)
    rows = weight[candidates.to(weight.device)]
    if blind.numel() and candidates.numel():
        fine = ~(rows[:, blind] != 0).flatten(1).any(1)
        candidates, rows = candidates[fine.cpu()], rows[fine]
    if not candidates.numel() and empty is None:
        return None
    values = offset[candidates].expand(2, -1)
    if before is not None and candidates.numel() and bool(before.constant.any()):
        hot = before.constant.nonzero().reshape(-1)
        taps = rows[:, hot.to(weight.device)].cpu().to(torch.float64)
        taps = taps.flatten(2).sum(2) if taps.dim() > 2 else taps
        values = values + before.values[:, hot] @ taps.T
        if padded or bool((before.profile[hot] != 0).any()):
            fine = ~(rows[:, hot.to(weight.device)] != 0).flatten(1).any(1).cpu()
            candidates, values = candidates[fine], values[:, fine]
    result = silent.clone()
    result[candidates] = True
    full = torch.where(silent, offset, 0.0).repeat(2, 1)
    full[:, candidates] = values
    return Facts.of(result, full)

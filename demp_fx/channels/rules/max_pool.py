"""Max pooling, which looks beyond the margins of what was padded for it."""

from __future__ import annotations

from dataclasses import replace

from demp_fx.channels.facts import Facts
from demp_fx.channels.rules.couple import couple, trailing
from demp_fx.channels.stream import Rule, Stream
from demp_fx.channels.value import Call, Inside
from demp_fx.shapes import each


def max_pool(space: int) -> Rule:
    """The largest of each window. Of what was padded with something as small as any of it, that is
    what it was without, where no window is all margin."""
    rule = couple(trailing(space), "max_pool", "all")

    def pooled(walk: Stream, call: Call) -> None:
        x = call.tensors[0]
        before = walk.value(x)
        if (inside := before.inside) is not None and _reaches_inside(call, space, inside):
            facts = inside.facts
            known = facts.flat & (facts.values >= inside.fill).all(0)
            x.__dict__["demp"] = replace(before, known=Facts.of(known, facts.values))
        rule(walk, call)
        x.__dict__["demp"] = before

    return pooled


def _reaches_inside(call: Call, space: int, inside: Inside) -> bool:
    """Whether no window lies in the margins alone, at any size of what they are around."""
    names = ("kernel_size", "padding", "dilation")
    kernel, padding, dilation = (each(call.arg(name), space) for name in names)
    if set(dilation) != {1} or call.arg("ceil_mode"):
        return False
    first = call.tensors[0].dim() - space
    return all(
        d >= first and width + padding[d - first] < kernel[d - first]
        for d, width in inside.margins.items()
    )


RULES: dict[str, Rule] = {f"aten::max_pool{n}d{which}": max_pool(n)
                          for n in (1, 2, 3) for which in ("", "_with_indices")}  # fmt: skip

"""Tensors that code makes: one number everywhere, or random ones."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from demp_fx.channels.blanks import stays_blank
from demp_fx.channels.facts import Facts
from demp_fx.channels.stream import Rule, Stream
from demp_fx.channels.value import Call

# Results of the operand's shape that hold none of its numbers.
LIKE = {"aten::empty_like", "aten::zeros_like", "aten::ones_like", "aten::full_like",
        "aten::rand_like", "aten::randn_like", "aten::bernoulli", "aten::bernoulli_",
        "aten::bernoulli.p", "aten::fill_", "aten::zero_", "aten::uniform_", "aten::normal_",
        "aten::exponential_", "aten::log_normal_", "aten::cauchy_", "aten::geometric_",
        "aten::random_"}  # fmt: skip
# Results of a shape that code has worked out. (Random numbers are as good in any other number.)
FILLS = {"aten::zeros", "aten::ones", "aten::full", "aten::empty", "aten::rand", "aten::randn",
         "aten::new_zeros", "aten::new_ones", "aten::new_full", "aten::new_empty"}  # fmt: skip
NUMBERS = {"zeros": 0.0, "zero_": 0.0, "ones": 1.0}
GIVEN = {"scalar_tensor": "s", "fill_": "value"}  # as "fill_value" by all others


def like(walk: Stream, call: Call) -> None:
    """The result has the operand's channels and numbers of its own."""
    x, out = call.tensors[0], call.outputs[0]
    before, known = walk.value(x), _one_number(walk, call, out)
    walk.give(out, before.labels, known)
    if before.blank and out is x:
        x.__dict__["demp"] = replace(before, known=known, version=walk.version(x))
    elif before.blank:
        stays_blank(walk, x, [out], lambda t: [t])


def fill(walk: Stream, call: Call) -> None:
    """One number everywhere, or random ones, in a shape that code has worked out: it has no
    channels yet, and if that shape follows others it can have those that it meets."""
    out = call.outputs[0]
    walk.give(out, (), _one_number(walk, call, out) if walk.running.follows else None)
    if walk.running.follows:
        walk.value(out).blank = frozenset(range(out.dim()))


def scalar(walk: Stream, call: Call) -> None:
    """A number among the operands of an op that takes tensors."""
    out = call.outputs[0]
    walk.give(out, (), _one_number(walk, call, out))


def literal(walk: Stream, call: Call) -> None:
    """`torch.tensor(...)`: the numbers stand in the code, unless they are sizes of the example."""
    x, out = call.tensors[0], call.outputs[0]
    value = walk.value(x)
    exact = walk.with_facts and not (x.is_meta or walk.running.sized) and x.is_floating_point()
    facts = Facts.exactly(x) if exact and value.data is None else value.facts
    walk.moves += 1
    walk.give(out, value.labels, facts, value.data)


def _one_number(walk: Stream, call: Call, out: Tensor) -> Facts | None:
    """What is known of a constant. (What depends on a size of the example is none.)"""
    name = call.op._schema.name.removeprefix("aten::").removeprefix("new_").removesuffix("_like")
    number = NUMBERS.get(name)
    if number is None and not walk.running.sized:
        number = call.arg(GIVEN.get(name, "fill_value"))
    if not isinstance(number, (int, float)) or not walk.with_facts or not out.is_floating_point():
        return None
    return Facts.exactly(torch.tensor(number, dtype=out.dtype)).aligned(out.dim())


RULES: dict[str, Rule] = {**dict.fromkeys(LIKE, like), **dict.fromkeys(FILLS, fill),
                          **dict.fromkeys(("aten::lift_fresh", "aten::lift_fresh_copy"), literal),
                          "aten::scalar_tensor": scalar}  # fmt: skip

"""Inputs to compare two modules on: random ones of another batch size, or of another image size,
and sequences that are shorter."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from demp_fx.inputs import Inputs

FEW = 3  # samples tell as much as many do
SMALL = 64  # smaller images are made larger for another try, others smaller


def fresh(inputs: Inputs) -> Inputs:
    """Random inputs of the shapes of `inputs`, of another number of samples: one more than there
    are, or few where there are many; integers are reused."""
    batched = _is_batched(inputs)
    generator = torch.Generator().manual_seed(0)

    def draw(t: Tensor) -> Tensor:
        samples = t.shape[0] if t.dim() else 1
        if batched:
            samples = samples + 1 if samples < FEW else FEW - (samples == FEW)
        if t.is_floating_point():
            shape = (samples, *t.shape[1:]) if t.dim() else ()
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(t)
        return t[torch.arange(samples, device=t.device) % t.shape[0]] if t.dim() else t

    return inputs.map(draw)


def few(inputs: Inputs) -> Inputs:
    """The first few samples of `inputs`."""
    return inputs.map(lambda t: t[:FEW]) if _is_batched(inputs) else inputs


def _is_batched(inputs: Inputs) -> bool:
    """Whether all tensors begin with the same dim, which is taken for that of the samples."""
    tensors = inputs.tensors
    return all(t.dim() for t in tensors) and len({t.shape[0] for t in tensors}) == 1


def resized(inputs: Inputs, odd: bool = False) -> Inputs | None:
    """Random images (and volumes) of another size than the example's, which no window or stride
    divides if it is `odd`; None where it has none."""
    if not any(t.dim() > 3 and t.is_floating_point() for t in inputs.tensors):
        return None
    generator = torch.Generator().manual_seed(1)

    def draw(t: Tensor) -> Tensor:
        if t.dim() < 4 or not t.is_floating_point():
            return t
        sides = [(n // 2 if n >= SMALL else n + n // 2) | odd for n in t.shape[2:]]
        return torch.randn(*t.shape[:2], *sides, generator=generator, dtype=torch.float64).to(t)

    return inputs.map(draw)


def shortened(inputs: Inputs) -> Iterator[Inputs]:
    """The first half of the example's sequences, masks and all: an odd number of steps, for each
    dim of the first input that may be of steps, in (batch, steps) of whole numbers, and in (batch,
    steps, features) or (batch, features, steps)."""
    first = inputs.tensors[0]
    dims = range(1, first.dim()) if first.dim() == 3 or not first.is_floating_point() else ()
    for steps in {first.shape[d] for d in dims} - {1, 2, 3}:
        yield inputs.map(functools.partial(_halved, steps=steps))


def _halved(tensor: Tensor, steps: int) -> Tensor:
    for d in range(tensor.dim() > 1, tensor.dim()):
        if tensor.shape[d] == steps:
            tensor = tensor.narrow(d, 0, steps // 2 | 1)
    return tensor

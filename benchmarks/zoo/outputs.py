"""What a network gives, and how far two of them are apart."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks.zoo.networks import Inputs, call


def numbers(model: nn.Module, inputs: Inputs, train: bool) -> list[Tensor]:
    """Every tensor of the output in a mode; the model is left in that mode."""
    with torch.no_grad():
        return leaves(call(model.train(train), inputs))


def leaves(output: Any) -> list[Tensor]:
    """The floating-point tensors in an output, by the order of their names or places."""
    if hasattr(output, "to_tuple"):  # what transformers' models return
        output = output.to_tuple()
    return [
        t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()
    ]


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest number of the same tensor; inf where the
    shapes differ."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return math.inf
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        scale = max(float(b.abs().max()), torch.finfo(torch.float64).tiny)
        error = float((a.double() - b.double()).abs().max()) / scale
        worst = math.nan if math.isnan(error) or math.isnan(worst) else max(worst, error)
    return worst


def trains(model: nn.Module, inputs: Inputs) -> str:
    """ "" if a forward and backward in train mode give every parameter that gets a gradient a
    finite one; else what is wrong."""
    model.train()
    total = sum((t.square().mean() for t in leaves(call(model, inputs))), torch.zeros(()))
    total.backward()
    broken = [
        n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
    ]
    model.zero_grad(set_to_none=True)
    return f"gradients that are not finite: {broken[:3]}" if broken else ""


RATES = ("p", "drop_prob", "drop_rate", "dropout", "attn_drop_p", "dropout_p")


def without_chance(model: nn.Module) -> nn.Module:
    """Dropout and stochastic depth off, so that train mode can be compared number by number."""
    for module in model.modules():
        for rate in RATES:
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    return model


def own_error(model: nn.Module, inputs: Inputs, expected: list[Tensor]) -> float:
    """How far the model's train-mode output moves when its input moves by its last digits. It is
    large where batch statistics of few numbers make it chaotic, or where it throws dice."""

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value * (1 + 1e-15 * torch.randn_like(value))

    return relative_error(numbers(model, pytree.tree_map(moved, inputs), True), expected)


def parameters(model: nn.Module) -> int:
    """How many numbers its parameters hold."""
    return sum(p.numel() for p in model.parameters())


def one_line(error: BaseException) -> str:
    """An exception in one line of bounded length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]

"""The one property: whatever the network and whatever is dead, the narrow module computes the same.

"The same" is: the same outputs in float64, in eval mode and (where everything was proven) in train
mode, at another batch size and resolution; the same gradient at the input; the same state_dict
keys; and the same again from the plan alone, after it was written as JSON and read back.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import demp_fx
from demp_fx.channels.stream import FAILED
from demp_fx.inputs import Inputs
from demp_fx.passes.calls import run
from demp_fx.passes.narrow import narrow as carry_out
from demp_fx.passes.plan import PruningPlan
from tests.fuzz.network import Net, takes_other_sizes

EVAL_ERROR = 1e-10
TRAIN_ERROR = 1e-9


class WrongError(AssertionError):
    """The narrow module is not what the original is."""


def check(net: Net) -> demp_fx.CompileResult:
    """Compile a network and compare; raises `WrongError`, or whatever compile raises."""
    model = net.build()
    example = net.inputs(2)
    fresh = net.inputs(3, larger=int(takes_other_sizes(model)), seed=2)
    calibration = [net.inputs(4, seed=3)] if net.observed else None
    before = copy.deepcopy(model.state_dict())

    result = demp_fx.compile(model, example, calibration, verify=False, cuts=net.cuts)  # type: ignore[arg-type]

    narrow = result.module
    _rules_hold(result)
    _unchanged(before, model)
    _keys(model, narrow)
    if calibration is not None:
        _same(model, narrow, calibration[0], False, EVAL_ERROR)
        copy.deepcopy(narrow).train()(fresh)
    else:
        for x in (example, fresh):
            _same(model, narrow, x, False, EVAL_ERROR)
            _same(model, narrow, x, True, TRAIN_ERROR)
        _gradients(net, model, narrow)
    _replayed(model, example, result, calibration[0] if calibration is not None else fresh)
    return result


def _rules_hold(result: demp_fx.CompileResult) -> None:
    """A rule with an error in it gives channels up; that is exact, but a bug."""
    for pin in result.report.pinned:
        if pin.reason.startswith(FAILED):
            raise WrongError(f"{pin.reason} at {pin.source}")


def _outputs(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def distance(expected: Any, found: Any) -> float:
    """The largest difference, relative to the largest number expected."""
    worst = 0.0
    for a, b in zip(_outputs(expected), _outputs(found), strict=True):
        if a.shape != b.shape:
            raise WrongError(f"shapes differ: {tuple(b.shape)} instead of {tuple(a.shape)}")
        scale = max(float(a.abs().max()), 1e-3)
        worst = max(worst, float((a - b).abs().max()) / scale)
    return worst


def _same(model: nn.Module, narrow: nn.Module, x: Tensor, training: bool, bound: float) -> None:
    """In one mode; dropout and stochastic depth are held still."""
    inputs = Inputs.of(x)
    error = distance(run(model, inputs, training), run(narrow, inputs, training))
    if not error <= bound:
        raise WrongError(f"{'train' if training else 'eval'} mode differs by {error:.1e}")


def _gradients(net: Net, model: nn.Module, narrow: nn.Module) -> None:
    """The gradient at the input, in eval mode; and in train mode every parameter can get one."""
    if net.space:
        gradients = []
        for module in (model.eval(), narrow.eval()):
            x = net.inputs(2, seed=4).requires_grad_()
            sum(t.cos().sum() for t in _outputs(module(x))).backward()
            gradients.append(x.grad)
        error = distance(*gradients)
        if not error <= TRAIN_ERROR:
            raise WrongError(f"the gradient at the input differs by {error:.1e}")
    training = copy.deepcopy(narrow).train()
    outputs = _outputs(training(net.inputs(3, seed=5)))
    sum(t.sum() for t in outputs if t.requires_grad).backward()
    for name, p in training.named_parameters():
        if p.grad is not None and not bool(p.grad.isfinite().all()):
            raise WrongError(f"the gradient of {name} is not finite")


def _keys(model: nn.Module, narrow: nn.Module) -> None:
    wide, thin = model.state_dict(), narrow.state_dict()
    if list(wide) != list(thin):
        raise WrongError(f"state_dict keys differ: {set(wide) ^ set(thin)}")
    for key, value in thin.items():
        sizes = zip(value.shape, wide[key].shape, strict=True)
        if not all(0 < n <= m for n, m in sizes):
            raise WrongError(f"{key} is {tuple(value.shape)}, it was {tuple(wide[key].shape)}")


def _unchanged(before: dict[str, Tensor], model: nn.Module) -> None:
    for key, value in model.state_dict().items():
        if not torch.equal(before[key], value):
            raise WrongError(f"the original's {key} was changed")


def _replayed(model: nn.Module, example: Tensor, result: Any, x: Tensor) -> None:
    """The plan, written and read back, gives the same module to the last bit."""
    plan = PruningPlan.from_json(result.plan.to_json())
    again = carry_out(demp_fx.trace(model, example), plan)
    inputs = Inputs.of(x)
    if distance(run(result.module, inputs, False), run(again, inputs, False)) > 0:
        raise WrongError("the plan does not replay to the same module")

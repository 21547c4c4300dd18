"""The whole pipeline: trace, analyze, find the dead, plan, narrow, verify, hand over."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from demp_fx.channels.analysis import walk
from demp_fx.channels.cuts import Cuts
from demp_fx.channels.meta import without_collection
from demp_fx.errors import UsageError
from demp_fx.inputs import ExampleInputs, Inputs
from demp_fx.passes.asked import Asked
from demp_fx.passes.make_plan import fit
from demp_fx.passes.observe import batches as read_batches
from demp_fx.passes.observe import observe
from demp_fx.passes.outcome import CompileReport
from demp_fx.passes.plan import PruningPlan
from demp_fx.passes.summary import summarize
from demp_fx.passes.verify import followed_mode
from demp_fx.passes.verify import verify as verify_pass
from demp_fx.trace import trace_graph
from demp_fx.training.optimizer import check, repoint
from demp_fx.turns import in_turn


@dataclass(frozen=True)
class CompileResult:
    """What `compile` hands over.

    `module`: the narrower GraphModule, with parameters of its own. `plan`: what was done, to replay
    on another checkpoint of the same model. `report`: the figures.
    """

    module: fx.GraphModule
    plan: PruningPlan
    report: CompileReport


@dataclass
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@in_turn
@torch.inference_mode(False)
def compile(
    model: nn.Module,
    example_inputs: ExampleInputs,
    calibration: Iterable[Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    verify: bool = True,
    *,
    cuts: Cuts = "pays",
    keep: Sequence[str] = (),
    round_to: int = 1,
) -> CompileResult:
    """Cut the dead channels out of a model.

    Args:
        model: any module that can be traced; it is not changed.
        example_inputs: a tensor, or a tuple or dict of the forward's arguments.
        calibration: batches of inputs (or of (input, target) pairs) for the death test; without it
            only channels that the weights prove dead or constant go.
        optimizer: re-pointed at the narrow parameters, its state sliced, once all has succeeded.
        verify: compare with the original in float64, in both modes, before handing over.
        cuts: where the graph may be cut inside a residual sum or before one reader of several:
            where it "pays", "always" or "never".
        keep: layers or submodules that keep their shape, as name patterns ("head", "blocks.*.mlp").
        round_to: widths are rounded up to a multiple of this: 8, say, for tensor cores.

    Raises:
        UsageError: inputs that do not fit, weights that are not finite (or not there), an empty
            calibration set, names to keep that no layer has.
        TraceError: the model cannot be traced.
        VerificationError: the result differs from the original.
    """
    clock, asked = _Clock(), Asked(keep, round_to)
    if optimizer is not None and isinstance(model, nn.Module):
        check(optimizer, model)
    with clock("trace"):
        inputs = Inputs.of(example_inputs)
        graph = trace_graph(model, example_inputs)
        _check_weights(model)
    with clock("analyze"):
        walked = bare = walk(graph)
    samples, probe = 0, inputs
    if calibration is not None:
        with clock("observe"):
            batches = read_batches(calibration, graph)  # one at a time: they may be large
            first = list(itertools.islice(batches, 1))
            training = optimizer is not None or model.training
            modes = (False, True) if training else (False,)
            every = itertools.chain(first, batches)
            seen, samples = observe(graph, every, walked.activations, modes)
            probe = first[0]
        with clock("analyze"):
            walked = walk(graph, seen)
    with clock("narrow"), without_collection():
        planned = fit(graph, walked, cuts, asked)
    plan, module = planned.plan, planned.module
    with clock("summarize"), without_collection():
        report = summarize(type(model).__name__, graph, planned, samples, bare)
    if verify:
        with clock("verify"):
            train = samples == 0 or optimizer is not None or model.training
            report.verification = verify_pass(
                model, module, probe, observed=samples > 0, train=train, traced=graph
            )
        report.warnings += _reservations(report, module, train)
    if optimizer is not None:
        with clock("optimizer"):
            repoint(optimizer, model, module, plan)
    report.seconds = clock.seconds
    return CompileResult(module, plan, report)


def _reservations(report: CompileReport, module: fx.GraphModule, train: bool) -> list[str]:
    """What verification has found that a user should know of; `train`: it was to compare that mode,
    too."""
    proof, found = report.verification, []
    assert proof is not None

    def noted(ending: str) -> str:
        return "".join(f"; {a}" for a in report.assumptions if a.endswith(ending))

    if proof.fixed:
        what = "holds for inputs of the example's sizes only, which the trace took as given"
        found.append(what + noted("inputs' sizes"))
    elif proof.sized:
        what = "inputs of other sizes may go another way through the original's code, which was "
        found.append(what + "not followed" + noted("inputs' sizes"))
    if proof.forgets:
        what = "holds for a first call only: the original keeps something from call to call that "
        found.append(what + "was not followed" + noted("result does not keep"))
    if train and None in (proof.eval_error, proof.train_error) and followed_mode(module):
        lines = "; ".join(followed_mode(module))
        found.append(f"not compared in both modes: the original's code asks: {lines}")
    return found


def _check_weights(model: nn.Module) -> None:
    """They have numbers, and finite ones. Infinities are fine in buffers alone: attention masks are
    made of them."""
    masks = dict(model.named_buffers())
    for name, tensor in (*model.named_parameters(), *masks.items()):
        if tensor.is_meta:
            raise UsageError(
                f"{name} has no numbers (it is on the meta device): load the weights first; "
                "demp_fx.analyze shows what is coupled without them"
            )
        if tensor.is_floating_point():
            if bool(tensor.detach().sum().isfinite()):  # one pass over sound weights
                continue
            broken = tensor.isnan() if name in masks else ~tensor.isfinite()
            if bool(broken.any()):
                raise UsageError(
                    f"{name} has values that are not finite: nothing can be proven about this "
                    "model; load weights from before the training diverged"
                )

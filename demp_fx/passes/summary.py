"""The compile report: what went, what stayed and why."""

from __future__ import annotations

import platform
from collections.abc import Mapping

import torch
from torch import fx, nn

from demp_fx.channels.analysis import walk as walk_anew
from demp_fx.channels.constraints import Axis
from demp_fx.channels.dependencies import DependencyGraph
from demp_fx.channels.solution import Solution
from demp_fx.channels.walk import Walk
from demp_fx.passes.make_plan import Planned
from demp_fx.passes.outcome import CompileReport, Pinned, Width


def summarize(
    name: str, graph: fx.GraphModule, planned: Planned, samples: int, bare: Walk | None = None
) -> CompileReport:
    """Figures of a finished narrowing of the model `name`; `samples`: seen in calibration.

    `bare`: a walk without what was seen, to tell what the weights alone prove.
    """
    plan, module, walk, solution = planned.plan, planned.module, planned.before, planned.solution
    notes = graph.meta["demp_fx"]
    old, new = dict(graph.named_modules()), dict(module.named_modules())
    widths = _widths(old, new)
    known = _known(walk)
    proven = _known(bare or walk_anew(graph)) if walk.observed else known
    observed = known - proven
    report = CompileReport(
        model=name,
        params_before=_parameters(old),
        params_after=_parameters(new),
        macs_before=walk.system.macs,
        macs_after=planned.after.system.macs,
        channels_before=sum(w.out_before for w in widths),
        channels_after=sum(w.out_after for w in widths),
        widths=widths,
        pinned=_pinned(walk, solution),
        dead_proven=proven,
        dead_observed=observed,
        constants_folded=sum(len(f.dropped) for f in plan.folds),
        carriers=sum(len(f.carriers) for f in plan.folds),
        gathers=len(plan.gathers),
        scatters=len(plan.sums),
        opaque=dict(notes.opaque),
        versions={"torch": torch.__version__, "python": platform.python_version()},
    )
    if notes.exported:
        report.assumptions.append(f"traced by torch.export: {notes.exported}")
    report.assumptions += [f"traced: {line}" for line in notes.baked]
    if samples:
        report.assumptions.append(
            f"{observed} channels that the weights do not prove dead never fired on the "
            f"{samples} calibration samples"
        )
    report.warnings += _warnings(walk, solution)
    return report


def _parameters(modules: Mapping[str, nn.Module]) -> int:
    """How many numbers all parameters have, those that are tied once."""
    tables = (module._parameters.values() for module in modules.values())
    return sum(p.numel() for p in {p for table in tables for p in table if p is not None})


def _widths(old: Mapping[str, nn.Module], new: Mapping[str, nn.Module]) -> list[Width]:
    widths = []
    for name, layer in old.items():
        twin = new.get(name)
        weight = dict(layer._parameters).get("weight")
        narrow = dict(twin._parameters).get("weight") if twin is not None else None
        if not isinstance(weight, nn.Parameter) or weight.dim() < 2:
            continue
        if isinstance(narrow, nn.Parameter):
            shapes = [(w.shape[1], w.shape[0]) if "Transpose" in type(layer).__name__ else w.shape
                      for w in (weight, narrow)]  # fmt: skip
            (out_b, in_b, *_), (out_a, in_a, *_) = shapes
            widths.append(
                Width(name=name, kind=type(layer).__name__, out_before=out_b, out_after=out_a,
                      in_before=in_b, in_after=in_a)
            )  # fmt: skip
    return widths


def _known(walk: Walk) -> int:
    """How many channels are known at some read to be zero or constant."""
    dead = torch.zeros(walk.system.atoms, dtype=torch.bool)
    for read in walk.system.reads:
        if read.facts is not None:
            dead[read.inputs[read.facts.known]] = True
    return int(dead.sum())


def _pinned(walk: Walk, solution: Solution) -> list[Pinned]:
    groups = DependencyGraph(walk.system, solution, set(walk.params)).bare
    return [
        Pinned(reason=pin.reason, op=pin.op, node=pin.node, source=pin.source,
               members=[f"{m.name}[{m.dim}]" for m in group.members], channels=pin.channels)
        for group in groups
        if group.members
        for pin in group.pins
    ]  # fmt: skip


def _warnings(walk: Walk, solution: Solution) -> list[str]:
    return [
        f"every channel of {axis.owner.rpartition('.')[0] or axis.owner} is dead; one of "
        f"{axis.size} is kept, because torch has no layers of width zero"
        for axis in solution.revived
        if _is_layer_output(walk, axis)
    ]


def _is_layer_output(walk: Walk, axis: Axis) -> bool:
    value = walk.params.get(axis.owner)
    return axis.dim == 0 and value is not None and value.data is not None and value.data.dim() > 1

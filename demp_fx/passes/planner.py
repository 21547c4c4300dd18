"""From a solution to a plan: what is sliced, where the graph is cut, where constants go."""

from __future__ import annotations

import numpy as np

from demp_fx.channels.constants import foldable
from demp_fx.channels.solution import Solution
from demp_fx.channels.walk import Walk
from demp_fx.passes.count import counts
from demp_fx.passes.edges import put_edges
from demp_fx.passes.folds import foldings, indices
from demp_fx.passes.plan import Frozen, Literal, PruningPlan, Regroup
from demp_fx.passes.resize import literals
from demp_fx.passes.scalars import frozen_scalars, narrower_sizes
from demp_fx.passes.sizes import MisfitError, Sizes
from demp_fx.passes.widths import Widths


def plan_of(walk: Walk, solution: Solution) -> PruningPlan:
    """The plan that carries out a solution on the graph that was walked.

    Raises `MisfitError` where a node cannot do with the sizes that it would get.
    """
    plan, widths = PruningPlan(), Widths(walk, solution)
    _regroup(plan, widths)
    _keep(plan, walk, solution)
    sizes = Sizes(
        walk.env, widths.masks, widths.seen, widths.blocks, widths.merged, walk.crops.sizes.varies
    )
    sizes.changed.update(narrower_sizes(walk.graph, sizes))
    written = _resize(plan, widths, sizes)
    plan.counts = counts(walk.layers, sizes)
    numbers = frozen_scalars(walk.graph, sizes)
    plan.literals = written + [n for n in numbers if isinstance(n, Literal)]
    plan.frozen = [n for n in numbers if isinstance(n, Frozen)]
    put_edges(plan, widths)
    folds = foldable(walk.system)
    readers = {read.fold: read for read in walk.system.reads if id(read) in folds}
    for read in readers.values():  # one for each weight: what it folds serves all others
        plan.folds += foldings(read, folds[id(read)], solution)
    return plan


def _resize(plan: PruningPlan, widths: Widths, sizes: Sizes) -> list[Literal]:
    """Put the new sizes of all values into the plan; returns the arguments that follow."""
    written: list[Literal] = []
    misfits = widths.misfits
    for node in widths.walk.env:
        if node in widths.dropped:
            continue
        new = sizes.new(node)
        blocks = plan.grouped.get(str(node.target)) if node.op == "get_attr" else None
        if blocks is not None:  # of a convolution that is called as a function
            new = {**new, 1: len(blocks[0])}
        if new:
            plan.nodes[node.name] = new
        try:
            written += literals(node, sizes)
        except MisfitError as error:
            misfits.update(dict.fromkeys(error.nodes))
    if misfits:
        raise MisfitError(*misfits)
    return written


def _keep(plan: PruningPlan, walk: Walk, solution: Solution) -> None:
    """What stays of parameters and buffers. Axes that keep the same have one list for it."""
    params = {k: v.data for k, v in walk.params.items() if v.data is not None}
    axes = [a for a in walk.system.axes if a.dim >= 0 and a.owner in params]
    kept = np.flatnonzero(solution.mask.numpy())
    firsts, lasts = (
        np.searchsorted(kept, np.array(ends, dtype=np.int64)).tolist()
        for ends in ([a.start for a in axes], [a.stop for a in axes])
    )
    lists: dict[bytes, list[int]] = {}
    for axis, first, last in zip(axes, firsts, lasts, strict=True):
        if last - first < axis.size:
            index = kept[first:last] - axis.start
            key = index.tobytes()
            if key not in lists:
                lists[key] = index.tolist()
            plan.keep.setdefault(axis.owner, {})[axis.dim] = lists[key]
            plan.shapes[axis.owner] = list(params[axis.owner].shape)


def _regroup(plan: PruningPlan, widths: Widths) -> None:
    """Which inputs each block of filters of a grouped convolution keeps."""
    walk, kept = widths.walk, widths.solution.kept
    for grouping in walk.system.groupings:
        second = kept(grouping.second)
        alive = second.any(1)
        told = second.size(1) > 1 or bool(kept(grouping.first).all())
        if bool(second.all()) and told:  # else the layer takes each filter for a group
            continue
        if grouping.consumer is not None:
            filters = int(kept(grouping.first)[alive][0].sum())
            plan.regroups.append(
                Regroup(
                    producer=grouping.weight, consumer=grouping.consumer,
                    rank=widths.rank_of(grouping.weight), filters=filters,
                    index=[indices(mask) for mask in second[alive]],
                )
            )  # fmt: skip
        else:
            plan.grouped[grouping.weight] = [indices(mask) for mask in second[alive]]
            value = walk.params[grouping.weight].data
            assert value is not None
            plan.shapes[grouping.weight] = list(value.shape)

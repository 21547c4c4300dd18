"""What the channels of a group are, and what they cost."""

from __future__ import annotations

import torch
from torch import Tensor

from demp_fx.channels.constraints import Read
from demp_fx.channels.system import System


def states(system: System, root: Tensor) -> tuple[Tensor, Tensor]:
    """Two masks over atoms (read them at roots): channels that are zero wherever they are used,
    and channels that are known there to be zero or another constant."""
    met = torch.zeros(system.atoms, dtype=torch.bool)
    unknown, filled = met.clone(), met.clone()
    for step in system.flow:
        channels = root[step.inputs if isinstance(step, Read) else step.source]
        met[channels] = True
        if step.facts is None:
            unknown[channels] = True
        else:
            unknown[channels[~step.facts.known]] = True
            filled[channels[~step.facts.zero]] = True
    known = met & ~unknown
    return known & ~filled, known


def macs(system: System, group_of: Tensor, groups: int) -> list[float]:
    """The multiplications that vanish with each of `groups` numbered groups.

    `group_of`: the number of each atom's group. An op's work shrinks with the share that goes of
    each axis that it works along.
    """
    total = torch.zeros(groups, dtype=torch.float64)
    for work in system.work:
        left: dict[int, float] = {}
        for side in work.sides:
            numbers = group_of[side]
            ids, counts = numbers[numbers >= 0].unique(return_counts=True)
            for k, count in zip(ids.tolist(), counts.tolist(), strict=True):
                left[k] = left.get(k, 1.0) * (1 - count / side.numel())
        for k, share in left.items():
            total[k] += work.macs * (1 - share)
    found: list[float] = total.tolist()
    return found

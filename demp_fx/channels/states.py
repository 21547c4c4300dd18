"""What the channels of a group are, and what they cost."""

from __future__ import annotations

import torch
from torch import Tensor

from demp_fx.channels.system import Read, System


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

    `group_of`: the number of each atom's group. A contraction shrinks with the share of its inputs
    and of each axis of outputs that goes.
    """
    total = torch.zeros(groups, dtype=torch.float64)
    for read in system.reads:
        left = torch.ones(groups, dtype=torch.float64)
        for side in (read.inputs, *read.outputs):
            numbers = group_of[side.reshape(-1)]
            left -= left * numbers[numbers >= 0].bincount(minlength=groups) / numbers.numel()
        total += read.macs * (1 - left)
    return total.tolist()

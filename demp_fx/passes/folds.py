"""Where constants go that a read no longer receives: into its bias, or into channels that stay."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from demp_fx.channels.constants import by_bias, independent
from demp_fx.channels.constraints import Read
from demp_fx.channels.facts import Facts
from demp_fx.channels.solution import Solution
from demp_fx.passes.plan import Folding


def foldings(read: Read, facts: Facts, solution: Solution) -> list[Folding]:
    """Where the constants go that a read no longer receives."""
    fold = read.fold
    assert fold is not None
    kept = solution.kept(read.inputs)
    gone = facts.constant & ~kept
    if read.silent is not None:
        gone &= ~read.silent
    if not bool(gone.any()):
        return []
    found = []
    light = gone & by_bias(read, facts)
    if bool(light.any()):
        values = facts.values[0, light].tolist()
        found.append(
            Folding(weight=fold.weight, dim=fold.dim, dropped=indices(light),
                    bias=fold.bias, values=values)
        )  # fmt: skip
    rest = gone & ~light
    for profile in facts.profile[rest].unique().tolist():
        here = rest & (facts.profile == profile)
        stay = facts.constant & kept & (facts.profile == profile)
        carriers = _basis(facts.values, stay)
        mix = torch.linalg.pinv(facts.values[:, carriers]) @ facts.values[:, here]
        found.append(
            Folding(weight=fold.weight, dim=fold.dim, dropped=indices(here),
                    carriers=carriers, mix=mix.tolist())
        )  # fmt: skip
    return found


def indices(mask: Tensor) -> list[int]:
    """Where a mask is true."""
    found: list[int] = np.flatnonzero(mask.numpy()).tolist()
    return found


def _basis(values: Tensor, among: Tensor) -> list[int]:
    """Columns of a (2, n) matrix that span all columns in `among`, the largest first."""
    size = torch.where(among, values.abs().sum(0), -1.0)
    chosen: list[int] = []
    for index in size.argsort(descending=True)[: int(among.sum())].tolist():
        if independent(values[:, [*chosen, index]].numpy()) > len(chosen):
            chosen.append(index)
        if len(chosen) == 2:
            break
    return chosen

"""Constants of channels that go are folded into the biases, or into channels, that stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from demp_fx.passes.plan import Folding


def folded(
    folds: Iterable[Folding], parameters: Mapping[str, Tensor],
    places: Mapping[str, Mapping[int, list[int]]],
) -> dict[str, Tensor]:  # fmt: skip
    """The parameters that change, anew.

    `folds`: by indices of the dense network. `places`: for each parameter and dim that is narrower
    than there, which of them it has; what it lacks has been folded before.
    """
    changed: dict[str, Tensor] = {}
    for fold in folds:
        weight = changed.get(fold.weight, parameters[fold.weight].detach())
        channels = weight.movedim(fold.dim, 0)
        has = places.get(fold.weight, {}).get(fold.dim, range(channels.shape[0]))
        place = {channel: k for k, channel in enumerate(has)}
        new = [k for k, channel in enumerate(fold.dropped) if channel in place]
        if not new:
            continue
        dropped = channels[[place[fold.dropped[k]] for k in new]].to(torch.float64)
        if fold.bias is not None:
            values = torch.tensor(fold.values, dtype=torch.float64, device=weight.device)[new]
            each = dropped.flatten(2).sum(2) if dropped.dim() > 2 else dropped
            bias = changed.get(fold.bias, parameters[fold.bias].detach())
            changed[fold.bias] = bias + torch.tensordot(values, each, dims=1).to(bias.dtype)
        else:
            mix = torch.tensor(fold.mix, dtype=torch.float64, device=weight.device)[:, new]
            more = torch.tensordot(mix, dropped, dims=1).to(weight.dtype)
            weight = weight.clone()
            weight.movedim(fold.dim, 0)[[place[c] for c in fold.carriers]] += more
            changed[fold.weight] = weight
    return changed

"""Before a narrowing is committed: old and new side by side, in float64, in both modes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from demp_fx.errors import VerificationError
from demp_fx.inputs import Inputs
from demp_fx.passes.calls import run
from demp_fx.passes.sides import difference
from demp_fx.passes.verify import FOLDED, TOLERANCE
from demp_fx.tracing.module import TracedModule
from demp_fx.training.deaths import Dead, held
from demp_fx.training.dense import Narrowing


def compare(
    old: tuple[TracedModule, Narrowing], new: tuple[TracedModule, Narrowing], inputs: Inputs
) -> float:
    """The largest relative difference between two instrumented modules, one narrowed further.

    Dead channels are held at their level in both, so that what is compared is the narrowing, and
    not whether the neurons that a test on data found dead are so on every input. Raises
    `VerificationError` where the two differ by more than rounding.
    """
    gone, limit, worst = new[1].gone, tolerance(*new), 0.0
    for training in (False, True):
        results = []
        for module, narrowing in (old, new):
            with held(module, _at(gone, narrowing.kept)):
                results.append(run(module, inputs, training))
        error = difference(*results)
        if not error <= limit:
            mode = "train" if training else "eval"
            raise VerificationError(
                f"a narrowing was undone: in {mode} mode its result was off by {error:.1e}"
            )
        worst = max(worst, error)
    return worst


def tolerance(module: TracedModule, narrowing: Narrowing) -> float:
    """How much of a difference is rounding: more where parameters were computed anew."""
    if not narrowing.plan.folds:
        return TOLERANCE
    eps = [torch.finfo(p.dtype).eps for p in module.parameters() if p.is_floating_point()]
    return FOLDED * max(eps)


def first(inputs: Inputs, samples: int) -> Inputs:
    """The first samples of a batch, if it can be told where they end."""
    sizes = {t.shape[0] for t in inputs.tensors if t.dim()}
    return inputs.map(lambda t: t[:samples] if t.dim() else t) if len(sizes) == 1 else inputs


def _at(gone: Mapping[str, Dead], kept: Mapping[str, Tensor]) -> dict[str, Dead]:
    """Dead channels of the dense network as those of a narrowing that has the `kept` ones."""
    return {name: Dead(d.mask[kept[name]], d.level[kept[name]]) for name, d in gone.items()}

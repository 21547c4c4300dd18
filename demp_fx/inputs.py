"""Example inputs: one tensor, a tuple or a dict of the forward's arguments, in one form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from demp_fx.errors import UsageError


@dataclass(frozen=True)
class Inputs:
    """The arguments of one forward call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, example: ExampleInputs) -> Inputs:
        """`example`: a tensor (the only argument), a tuple or list (by place), a dict (by name)."""
        if isinstance(example, Inputs):
            return example
        if any(isinstance(leaf, np.ndarray) for leaf in pytree.tree_leaves(example)):
            raise UsageError("inputs are to be tensors, not arrays of numpy: torch.from_numpy")
        if isinstance(example, Mapping):
            return cls((), dict(example))
        if isinstance(example, (tuple, list)):
            return cls(tuple(example), {})
        return cls((example,), {})

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
        """The same arguments with `function` applied to every tensor in them."""
        args, kwargs = pytree.tree_map_only(torch.Tensor, function, (self.args, self.kwargs))
        return Inputs(args, kwargs)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Every tensor in the arguments, in order."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


ExampleInputs = torch.Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any] | Inputs

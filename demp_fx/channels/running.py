"""The node whose ops run: what rules may ask of it, worked out when they do."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from demp_fx.calls import MADE, MADE_LIKE, called
from demp_fx.channels.averages import takes_average
from demp_fx.channels.masks import may_mask_all
from demp_fx.channels.writes import memory_of

aten = torch.ops.aten
FULL = {"new_full", torch.full, aten.full.default, aten.new_full.default}


@dataclass
class Running:
    """A node of `graph`, with the values that have `entered` it.

    `layers`: the modules by name; `env`: what every node has returned; `given`: the nodes that
    depend on the inputs; `made`: those computed of parameters alone; `lent`: the sizes of the
    inputs in these; `real`: a context in which parameters have their numbers.
    """

    node: fx.Node
    entered: Mapping[fx.Node, Any]
    graph: fx.GraphModule
    layers: Mapping[str, nn.Module]
    env: Mapping[fx.Node, Any]
    given: Set[fx.Node]
    made: Set[fx.Node]
    lent: Mapping[fx.Node, Set[int]]
    real: Callable[[], AbstractContextManager[None]]

    @cached_property
    def sized(self) -> bool:
        """Whether it is given a number to compute with, not only as a size, that depends on the
        inputs' sizes."""
        numbers = self.node.all_input_nodes
        if called(self.node) in FULL:
            args = self.node.args
            numbers = [self.node.kwargs.get("fill_value", args[-1] if args else None)]  # type: ignore[list-item]
        return any(
            isinstance(n, fx.Node) and n in self.given and isinstance(self.entered[n], (int, float))
            for n in numbers
        )

    @cached_property
    def follows(self) -> bool:
        """Whether the sizes that it names are all worked out of others."""
        if called(self.node) in MADE or called(self.node) in MADE_LIKE:
            return True
        leaves = pytree.tree_leaves((self.node.args, self.node.kwargs))
        numbers = (self.env[a] if isinstance(a, fx.Node) else a for a in leaves)
        return not any(isinstance(n, int) and n > 1 for n in numbers)

    def is_whole(self, tensor: Tensor) -> bool:
        """Whether a tensor that has entered is made of parameters, and as long for any input."""
        return any(
            t is tensor and n not in self.given and not self.lent.get(n)
            for n, t in self.entered.items()
        )

    @cached_property
    def counted(self) -> bool:
        """Whether zeros may leave an average that it takes over channels."""
        return takes_average(self.node, self.layers)

    @cached_property
    def values_alone(self) -> bool:
        """Whether of a result of values and indices, as `max` along a dim has, nobody asks for the
        indices."""
        return all(
            (user.target is operator.getitem and user.args[1] == 0)
            or (user.target is getattr and user.args[1] == "values")
            for user in self.node.users
        )

    @cached_property
    def masked(self) -> bool:
        """Whether it may mask all of a row."""
        return may_mask_all(self.node, self.graph, self.given, self.real)

    @cached_property
    def makers(self) -> dict[int, str]:
        """By storage: who made the weights that it is given."""
        return {
            memory_of(t): n.name
            for n, t in self.entered.items()
            if n in self.made and isinstance(t, Tensor)
        }

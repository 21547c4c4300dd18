"""The ends of an exported graph: arguments come in whole, and the result has the model's form."""

from __future__ import annotations

import collections
import dataclasses
import inspect
import operator
from collections.abc import Iterator
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree


def inputs(graph: fx.Graph, bound: inspect.BoundArguments) -> list[fx.Node]:
    """Placeholders for the arguments in `bound`, and nodes for what is in them: every leaf, in the
    order of pytree."""
    leaves = []
    for name, value in zip(_names(bound), (*bound.args, *bound.kwargs.values()), strict=True):
        argument = graph.placeholder(name)
        for path, _ in pytree.tree_flatten_with_path(value)[0]:
            leaf = argument
            for key in path:
                leaf = _item(graph, leaf, key)
            leaves.append(leaf)
    return leaves


def _names(bound: inspect.BoundArguments) -> list[str]:
    """Names for `bound.args` and then `bound.kwargs`."""
    names = []
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{name}_{k}" for k in range(len(value))]
        elif kind is inspect.Parameter.VAR_KEYWORD:
            names += list(value)
        else:
            names.append(name)
    return names


def _item(graph: fx.Graph, whole: fx.Node, key: Any) -> fx.Node:
    if isinstance(key, pytree.GetAttrKey):
        return graph.call_function(getattr, (whole, key.name))
    index = key.idx if isinstance(key, pytree.SequenceKey) else key.key
    return graph.call_function(operator.getitem, (whole, index))


def output(graph: fx.Graph, tree: pytree.TreeSpec, leaves: Iterator[Any]) -> Any:
    """The argument of an output node: `leaves` in the form of `tree`. A dataclass, as the models of
    transformers return, is made by a call of its class."""
    if tree.is_leaf():
        return next(leaves)
    children = tree.children() if hasattr(tree, "children") else tree.children_specs
    parts = [output(graph, child, leaves) for child in children]
    kind: Any = tree.type
    if kind in (tuple, list):
        return kind(parts)
    if kind in (dict, collections.OrderedDict):
        entries = dict(zip(tree.context, parts, strict=True))
        return entries if kind is dict else graph.call_function(kind, (entries,))
    if kind is collections.namedtuple:
        return graph.call_function(tree.context, tuple(parts))
    if dataclasses.is_dataclass(kind):
        named, *missing = tree.context if _is_nested(tree.context) else [tree.context]
        fields = dict(zip(named, parts, strict=True))
        made: Any = kind
        return graph.call_function(made, (), {**fields, **dict.fromkeys(*missing or [()])})
    raise NotImplementedError(f"an output of the type {kind.__name__}")


def _is_nested(context: Any) -> bool:
    """Whether a dataclass's context is torch's own: its fields, and those that are None."""
    return len(context) == 2 and all(isinstance(names, (list, tuple)) for names in context)

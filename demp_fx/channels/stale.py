"""What is known of a tensor that was written into since, under another name or of another shape."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from demp_fx.channels.blanks import catch_up
from demp_fx.channels.labels import varying
from demp_fx.channels.places import Places
from demp_fx.channels.value import Value
from demp_fx.channels.writes import carried, filled, known_of, memory_of, mixed, refined

CHANGED = "it is changed in place while others read it"


def refresh(walk: Places, tensor: Any, name: str = "") -> None:
    """See whether a tensor, be it what the node `name` has given or a weight of a layer, was
    written into since. (That is no part of what its reader records, and stays where that is
    forgotten.)"""
    if isinstance(tensor, Tensor):
        value = walk.value(tensor)
        if value.image_of is not None:
            catch_up(walk, tensor)
            value = walk.value(tensor)
        if value.version != walk.version(tensor):
            _stale(walk, tensor, name, value)


def _stale(walk: Places, tensor: Tensor, name: str, value: Value) -> None:
    """A tensor was changed in place through another name. Where that put one number everywhere,
    or each channel into itself, it is known what it holds now; else nothing about it can be
    relied on."""
    value = tensor.__dict__["demp"] = replace(value)  # of a parameter the old one is kept
    storage = memory_of(tensor)
    writes = walk.writes[storage][value.version :]
    shared = {other.name for other, t in walk.env.items()
              if isinstance(t, Tensor) and memory_of(t) == storage}  # fmt: skip
    edges = [edge for edge in walk.system.edges if edge.producer in shared]
    origin = torch.arange(walk.system.atoms)
    for edge in edges:
        origin[edge.target] = origin[edge.source]
    fills = all(write.number is not None for write in writes)
    finer = refined(value.labels, writes, origin)
    holds = finer is not None or carried(value.labels, writes, origin)
    for edge in edges:  # no cut on the way: the write would go to a copy
        if fills or holds:
            walk.system.same(edge.source, edge.target, walk.site)
        elif edge.producer == name:
            walk.system.pin(edge.target, CHANGED, walk.site)
    for label in () if fills or holds else value.labels:
        walk.system.pin(label, CHANGED, walk.site)
    if fills and tensor.dim() == 1:
        value.known = filled(value.facts, tensor, writes)
    elif finer is not None:
        value.known = known_of(value.facts, finer, writes)
    elif holds:
        value.known = mixed(value.facts, value.labels, tensor.dim(), writes, origin)
    else:
        value.known = None
    value.vector = value.never_negative = value.positive = False
    value.blank = frozenset()
    value.rows = value.shares = value.never_positive = value.data = None
    if finer is not None:  # along its other axes nothing was written that has channels
        for label in value.labels:
            if not set(varying(label)) <= set(varying(finer)):
                walk.system.pin(label, CHANGED, walk.site)
        value.labels = (finer,)
    if fills or holds:
        value.version = walk.version(tensor)

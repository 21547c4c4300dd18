"""Why a node must run again, with some of its inputs behind a cut: what they lose in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from demp_fx.channels.constraints import Edge, Read
from demp_fx.channels.labels import Labels, repeats, varying
from demp_fx.channels.nodes import Nodes
from demp_fx.channels.places import Places
from demp_fx.channels.system import Mark, System
from demp_fx.channels.value import Value


def lost(walk: Places, start: Mark, before: Mapping[fx.Node, Value], out: Any) -> list[fx.Node]:
    """Inputs with channels that could be supplied from nowhere (zeros, constants), which the
    node has turned into something that cannot: the last place to supply them is before it."""
    if not isinstance(out, Tensor) or any(
        isinstance(s, Edge) and s.kind == "sum" for s in walk.system.since(start)
    ):
        return []
    reads = {s.inputs.data_ptr() for s in walk.system.since(start) if isinstance(s, Read)}
    result, found = walk.value(out), []
    for n, value in before.items():
        if value.known is None or n.op == "get_attr":
            continue
        for label in value.labels:
            dims, size = varying(label), label.numel()
            if len(dims) != 1 or out.dim() <= dims[0] or out.size(dims[0]) != size:
                continue
            if label.data_ptr() in reads:
                continue
            had = _supplied(value, dims[0], size)
            if had is None or not bool(had.any()):
                continue
            around = (varying(x) for x in result.labels)
            blocks = any(len(place) > 1 and dims[0] in place for place in around)
            has = None if blocks else _supplied(result, dims[0], size)  # there, nothing can be
            if has is None or bool((had & ~has).any()):
                found.append(n)
                break
    return found


def wanted_elsewhere(walk: Nodes, node: fx.Node) -> list[fx.Node]:
    """What goes into one of several calls of a layer, where some of it is known: other calls may
    want those channels, for which they are put back in this one."""
    if node.op != "call_module" or walk.calls[str(node.target)] < 2:
        return []
    given = ((n, walk.env[n]) for n in node.all_input_nodes)
    return [n for n, t in given if isinstance(t, Tensor) and is_supplied(walk.value(t))]


def fixed(walk: Places, start: Mark, before: Mapping[fx.Node, Value]) -> list[fx.Node]:
    """Inputs whose channels repeat themselves along an axis, each index of which the node ties
    to a channel of its own: whatever they are merged with is then as long for any input.

    A layer that reads what another one makes stays in its group, as after any flattening,
    unless it hears a channel at some of its places only. And computed weights with several
    channels on one axis, which the node does not tell apart.
    """
    sames = walk.system.sames[start[0] :]
    pins = [pin.atoms for pin in walk.system.pins[start[1] :]]
    mixed = [n for n, v in before.items() if n in walk.made and _is_mixed(v.labels, pins)]
    if not sames:
        return mixed
    reads = [s for s in walk.system.since(start) if isinstance(s, Read)]
    alone = any(map(_partly_silent, reads))
    if not (walk.merged or alone):
        return mixed
    repeating = {
        label.data_ptr(): n
        for n, value in before.items()
        for label in value.labels
        if n.op != "get_attr" and len(varying(label)) == 1 and repeats(label)
        if n in walk.made or alone or not (reads and _is_a_parameters(label, walk.system))
    }
    return mixed + [
        repeating[a.data_ptr()]
        for same in sames if repeating
        for a, b in ((same.a, same.b), (same.b, same.a))
        if a.data_ptr() in repeating and not repeats(b)
    ]  # fmt: skip


def _is_a_parameters(label: Tensor, system: System) -> bool:
    first = int(label.reshape(-1)[0])
    return any(axis.dim >= 0 for axis in system.axes if axis.start <= first < axis.stop)


def _is_mixed(labels: Labels, pins: list[Tensor]) -> bool:
    """Whether there is a dim with several labels, all of them pinned."""
    dims = [varying(x) for x in labels]
    several = [d for d in set(dims) if dims.count(d) > 1]
    return any(
        all(torch.isin(x, torch.cat(pins)).all() for x in labels if varying(x) == d)
        for d in several if pins
    )  # fmt: skip


def _partly_silent(read: Read) -> bool:
    """Whether a parameter reads a channel at several places, and only some have no weights."""
    if read.fold is None or read.silent is None or not repeats(read.inputs):
        return False
    _, channel = np.unique(read.inputs.numpy(), return_inverse=True)
    silent = np.bincount(channel, read.silent.numpy())
    return bool(((silent > 0) & (silent < np.bincount(channel))).any())


def is_supplied(value: Value) -> bool:
    """Whether a value has channels of which all is known, which can be put back at any place."""
    for label in value.labels:
        dims = varying(label)
        known = _supplied(value, dims[0], label.numel()) if len(dims) == 1 else None
        if known is not None and bool(known.any()):
            return True
    return False


def _supplied(value: Value, dim: int, size: int) -> Tensor | None:
    facts = value.known.along(dim, size) if value.known is not None else None
    return facts.steady if facts is not None else None

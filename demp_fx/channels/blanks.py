"""Constants that may have as many channels as they meet: they, their images and their parts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from demp_fx.channels.labels import along, compress, moved, same_label, varying
from demp_fx.channels.stream import Stream


def adopt(walk: Stream, tensor: Tensor, *labels: Tensor) -> None:
    """Give labels to what may have as many channels as it meets, and to what that is an image or a
    part of."""
    for label in labels:
        own = _of(walk, tensor, *varying(label))
        if own is not None:
            walk.system.same(own, label, walk.site)
            continue
        if walk.value(tensor).image_of is not None:
            label = _by_whole(walk, tensor, label)
        walk.relabel(tensor, (*walk.value(tensor).labels, label))


def adopts(walk: Stream, tensor: Tensor, label: Tensor) -> bool:
    """Whether it can. Where the label is on a part of an axis, that has channels of its own, which
    may go: but not where it stays anyway, as positions do, of which the input may have others."""
    value, dims = walk.value(tensor), varying(label)
    if not set(dims) <= value.blank:
        return False
    if value.image_of is None:
        return True
    places = {d: value.parts[d][0] for d in dims}
    if any(label.size(d) > value.image_of.size(there) for d, there in places.items()):
        return False  # it holds what is there several times
    if any(label.size(d) < value.image_of.size(there) for d, there in places.items()):
        return len(dims) == 1 and not walk.system.is_fixed(label)
    wanted = moved(label, places, value.image_of.dim())
    return wanted is not None and adopts(walk, value.image_of, wanted)


def _by_whole(walk: Stream, tensor: Tensor, label: Tensor) -> Tensor:
    """Let the whole adopt the label of a part, or channels that those are some of; the part's label
    is then made of the whole's."""
    value, dims = walk.value(tensor), varying(label)
    whole, places = value.image_of, {d: value.parts[d][0] for d in dims}
    assert whole is not None
    own = _of(walk, whole, *sorted(places.values()))
    if own is None:
        wanted = moved(label, places, whole.dim())
        for d, there in places.items():
            if whole.size(there) > label.size(d):
                atoms = walk.system.fresh(f"{walk.site.node}.whole", -1, whole.size(there)).atoms
                wanted = along(atoms, whole.dim(), there)
        assert wanted is not None
        adopt(walk, whole, wanted)
        own = _of(walk, whole, *varying(wanted))
    assert own is not None
    part = moved(own, {there: d for d, there in places.items()}, tensor.dim())
    assert part is not None
    for d in dims:
        part = part.index_select(d, value.parts[d][1])
    if same_label(part, label):
        return label
    walk.system.same(part, label, walk.site)
    return part


def origin(walk: Stream, x: Tensor) -> Tensor | None:
    """What a tensor is an image of, or an image of images, all of them as they were laid out."""
    while (whole := walk.value(x).image_of) is not None:
        if any(there != d for d, (there, _) in walk.value(x).parts.items()):
            return None
        if whole.shape != x.shape or walk.value(x).lost:
            return None
        x = whole
    return x


def catch_up(walk: Stream, tensor: Tensor) -> None:
    """Give an image or a part the channels that its whole has adopted since."""
    value = walk.value(tensor)
    if (whole := value.image_of) is None:
        return
    catch_up(walk, whole)
    places = {there: d for d, (there, _) in value.parts.items()}
    for label in walk.value(whole).labels:
        dims = sorted(places[there] for there in varying(label) if there in places)
        if value.lost & set(varying(label)):
            walk.system.pin(label, "a part of it is taken before it has channels", walk.site)
        elif len(dims) == len(varying(label)) and _of(walk, tensor, *dims) is None:
            part = moved(label, places, tensor.dim())
            assert part is not None
            for d in dims:
                part = part.index_select(d, value.parts[d][1])
            walk.relabel(tensor, (*walk.value(tensor).labels, part))


def _of(walk: Stream, tensor: Tensor, *dims: int) -> Tensor | None:
    return next((x for x in walk.value(tensor).labels if varying(x) == dims), None)


def stays_blank(
    walk: Stream, x: Tensor, outputs: list[Tensor], apply: Callable[[Tensor], list[Tensor]]
) -> None:
    """Images and parts of what holds the same along an axis do so, too, along one of their own.

    `apply`: what has made them, of a tensor of that rank.
    """
    value = walk.value(x)
    labelled = {d for label in value.labels for d in varying(label)}
    for out in outputs:
        walk.value(out).image_of, walk.value(out).parts = x, {}
    for d in value.blank - labelled:
        if x.size(d) == 1:
            continue
        for out, image in zip(
            outputs, apply(along(torch.arange(x.size(d)), x.dim(), d)), strict=True
        ):
            line = compress(image)
            if len(varying(line)) == 1:
                walk.value(out).parts[varying(line)[0]] = d, line.reshape(-1)
    for out in outputs:
        parts = walk.value(out).parts
        walk.value(out).blank = frozenset(parts)
        walk.value(out).lost = value.blank - labelled - {there for there, _ in parts.values()}

"""Channels taken apart, put in another order and together again; branches and what joins them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.fuzz.block import Block, Place, Spec
from tests.fuzz.layers import NORMS, Function, acts, divisor, norms, pointwise_layer, widths

JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "plus": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "reversed": lambda a, b: b - 2 * a,
    "alpha": lambda a, b: torch.add(a, b, alpha=0.5),
    "mul": lambda a, b: a * b,
    "max": torch.maximum,
    "in_place": lambda a, b: b.add_(a),
    "augmented": lambda a, b: _iadd(b, a),
    "stacked": lambda a, b: torch.stack([a, b]).sum(0),
    "mean": lambda a, b: torch.stack([a, b], -1).mean(-1),
    "lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "div": lambda a, b: a / (b.abs() + 1),
}


def _iadd(a: Tensor, b: Tensor) -> Tensor:
    a += b
    return a


class Depth(nn.Module):
    """Stochastic depth: a whole sample's branch is dropped at random."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.new_ones((x.shape[0],) + (1,) * (x.dim() - 1))
        return x * F.dropout(rows, 0.2, self.training)


CHANCE: dict[str, Callable[[], nn.Module]] = {
    "never": nn.Identity,
    "dropout": lambda: nn.Dropout(0.3),
    "depth": Depth,
}


class Residual(Block):
    """The input around some blocks; where they change its width, through a projection."""

    draws = {"how": st.sampled_from(list(JOINS)), "act": acts, "scale": st.booleans(),
             "chance": st.sampled_from(list(CHANCE))}  # fmt: skip
    nests = {"inner": "same"}

    def __init__(
        self, at: Place, inner: tuple[Spec, ...] = (), how: str = "add", act: str = "none",
        chance: str = "never", scale: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(at)
        self.how = how
        self.body, self.out = self.chain(inner, at)
        self.around = nn.Identity()
        if self.out.width != at.width:
            self.around = pointwise_layer(at, self.out.width)
        self.resize = self.out.space != at.space
        self.scale = nn.Parameter(torch.ones(self.out.width)) if scale else None
        self.drop = CHANCE[chance]()
        self.act = Function(act)

    def forward(self, x: Tensor) -> Tensor:
        around, y = self.around(x), self.body(x)
        if self.resize:
            around = F.interpolate(around, size=y.shape[2:])
        if self.scale is not None:
            y = y * self.out.shaped(self.scale)
        if y is x or self.how in ("in_place", "augmented"):
            y = y.clone()
        return self.act(JOINS[self.how](around, self.drop(y)))


class Dense(Block):
    """What some blocks make goes beside what came in."""

    draws = {"order": st.sampled_from(["xy", "yx", "yxy", "xx"])}
    nests = {"inner": "same"}

    def __init__(self, at: Place, inner: tuple[Spec, ...] = (), order: str = "xy") -> None:
        super().__init__(at)
        self.order = order
        self.body, out = self.chain(inner, at)
        self.resize = out.space != at.space
        width = sum(at.width if piece == "x" else out.width for piece in order)
        self.out = out.but(width=width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.resize:
            x = F.interpolate(x, size=y.shape[2:])
        return torch.cat([x if piece == "x" else y for piece in self.order], self.dim)


class Branches(Block):
    """Two ways side by side, joined by a concat or a sum."""

    draws = {"how": st.sampled_from(["cat", "add", "mul", "stack"]), "width": widths}
    nests = {"left": "same", "right": "same"}

    def __init__(
        self, at: Place, left: tuple[Spec, ...] = (), right: tuple[Spec, ...] = (),
        how: str = "cat", width: int = 4,
    ) -> None:  # fmt: skip
        super().__init__(at)
        self.how = how
        self.left, a = self.chain(left, at)
        self.right, b = self.chain(right, at)
        self.fit = nn.ModuleList([pointwise_layer(a, width), pointwise_layer(b, width)])
        self.resize = a.space != b.space
        self.out = a.but(width=2 * width if how == "cat" else width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.fit[0](self.left(x)), self.fit[1](self.right(x))
        if self.resize:
            b = F.interpolate(b, size=a.shape[2:])
        if self.how == "cat":
            return torch.cat((a, b), dim=self.dim)
        if self.how == "stack":
            return torch.stack((a, b), 0).max(0).values
        return a + b if self.how == "add" else a * b


class Twice(Block):
    """The same blocks, called two times; a norm of its own behind each call or none."""

    draws = {"between": norms}
    nests = {"inner": "same"}

    def __init__(self, at: Place, inner: tuple[Spec, ...] = (), between: str = "none") -> None:
        super().__init__(at)
        body, out = self.chain(inner, at)
        fit = nn.Identity() if out.width == at.width else pointwise_layer(out, at.width)
        self.body = nn.Sequential(body, fit)
        self.resize = out.space != at.space
        self.between = NORMS[between](at)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            y = self.body(x)
            x = F.interpolate(y, size=x.shape[2:]) if self.resize else y
            x = self.between(x)
        return x


SPLITS = ("split", "sizes", "chunk", "slice", "narrow", "tensor_split", "select", "unbind",
          "every_other", "index", "view")  # fmt: skip


class Split(Block):
    """Channels in two or more pieces; one is worked on, and they come back in another order."""

    draws = {"how": st.sampled_from(SPLITS), "first": st.integers(1, 5), "swap": st.booleans(),
             "work": st.sampled_from(["layer", "relu", "double", "gate", "drop"])}  # fmt: skip

    def __init__(
        self, at: Place, how: str = "split", first: int = 1, swap: bool = False, work: str = "layer"
    ) -> None:
        super().__init__(at)
        self.how, self.swap, self.work = how, swap, work
        self.widen = pointwise_layer(at, 2) if at.width == 1 else nn.Identity()
        at = at.but(width=max(2, at.width))
        self.first = min(first, at.width - 1)
        a, b = self.parts(at.sample())
        width = a.shape[self.dim]
        self.layer = pointwise_layer(at.but(width=width), width) if work == "layer" else None
        gated = work == "gate" and width == b.shape[self.dim]
        self.gated = gated
        kept = b.shape[self.dim] + (0 if work == "drop" or gated else width)
        self.out = at.but(width=kept)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        d, n, k = self.dim, x.shape[self.dim], self.first
        match self.how:
            case "split":
                pieces = x.split(k, d)
                return pieces[0], torch.cat(pieces[1:], d)
            case "sizes":
                a, b = torch.split(x, [k, n - k], dim=d)
                return a, b
            case "chunk":
                pieces = x.chunk(2, dim=d)
                return pieces[0], pieces[1]
            case "slice":
                return (x[..., :k], x[..., k:]) if d == -1 else (x[:, :k], x[:, k:])
            case "narrow":
                return x.narrow(d, 0, k), x.narrow(d, k, n - k)
            case "tensor_split":
                a, b = torch.tensor_split(x, [k], dim=d)
                return a, b
            case "select":
                return x.select(d, k).unsqueeze(d), x.narrow(d, 0, n - 1)
            case "unbind":
                pieces = x.unbind(d)
                return torch.stack(pieces[:k], d), torch.stack(pieces[k:], d)
            case "every_other":
                return (x[..., ::2], x[..., 1::2]) if d == -1 else (x[:, ::2], x[:, 1::2])
            case "index":
                index = torch.arange(n)
                return x.index_select(d, index[k:].flip(0)), x.index_select(d, index[:k])
            case _:
                g = divisor(n, 2)
                y = x.unflatten(d, (g, n // g))
                at = d if d == 1 else -2
                return y.select(at, 0), y.select(at, g - 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.parts(self.widen(x))
        if self.gated:
            return a * torch.sigmoid(b)
        if self.work == "drop":
            return b
        if self.layer is not None:
            a = self.layer(a)
        elif self.work == "relu":
            a = F.relu(a)
        elif self.work == "double":
            a = 2 * a
        return torch.cat([b, a] if self.swap else [a, b], self.dim)


ORDERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "roll": lambda x, d: x.roll(1, d),
    "flip": lambda x, d: x.flip(d),
    "reversed": lambda x, d: x.index_select(d, torch.arange(x.shape[d]).flip(0)),
    "halves": lambda x, d: torch.cat(x.chunk(2, d)[::-1], d),
    "repeat": lambda x, d: torch.cat([x, x], d),
    "interleave": lambda x, d: x.repeat_interleave(2, d),
    "rotate": lambda x, d: torch.cat([-x.narrow(d, 1, x.shape[d] - 1), x.narrow(d, 0, 1)], d),
    "sorted": lambda x, d: x.sort(d).values,
    "cumulated": lambda x, d: x.cumsum(d) * 0.3,
    "gathered": lambda x, d: x.gather(d, torch.zeros_like(x, dtype=torch.int64)) + x,
    "zeros_beside": lambda x, d: torch.cat([x, torch.zeros_like(x)], d),
    "ones_beside": lambda x, d: torch.cat([torch.ones_like(x.narrow(d, 0, 1)), x], d),
    "first_everywhere": lambda x, d: x + x.narrow(d, 0, 1),
    "softmax": lambda x, d: x.softmax(d),
    "centred": lambda x, d: x - x.mean(d, keepdim=True),
    "largest": lambda x, d: x - x.amax(d, keepdim=True),
    "spread": lambda x, d: x / (x.std(d, correction=0, keepdim=True) + 1),
    "normalised": lambda x, d: F.normalize(x, dim=d, eps=0.5),
    "padded": lambda x, d: F.pad(x, (0, 0) * (x.dim() - 1 - d % x.dim()) + (1, 2), value=0.1),
    "tripled": lambda x, d: x.movedim(d, -1).unsqueeze(-1).expand(*x.movedim(d, -1).shape, 3)
    .flatten(-2).movedim(-1, d),
    "pooled": lambda x, d: F.max_pool1d(x.movedim(d, -1).flatten(0, -2).unsqueeze(1), 2, 1, 1)
    .squeeze(1)[:, : x.shape[d]].reshape(x.movedim(d, -1).shape).movedim(-1, d),
}  # fmt: skip


class Reorder(Block):
    """Channels moved, repeated or mixed by one function."""

    draws = {"how": st.sampled_from(list(ORDERS))}

    def __init__(self, at: Place, how: str = "roll") -> None:
        super().__init__(at)
        self.how = how
        self.out = at.but(width=ORDERS[how](at.sample(), at.dim).shape[at.dim])

    def forward(self, x: Tensor) -> Tensor:
        return ORDERS[self.how](x, self.dim)


def _view(x: Tensor, groups: int) -> Tensor:
    n, c = x.shape[:2]
    return x.view(n, groups, c // groups, *x.shape[2:]).transpose(1, 2).reshape(n, c, *x.shape[2:])


SHUFFLES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "view": lambda x, g: _view(x.contiguous(), g),
    "unflatten": lambda x, g: x.unflatten(1, (g, -1)).transpose(1, 2).flatten(1, 2),
    "channel_shuffle": lambda x, g: F.channel_shuffle(x.contiguous(), g),
    "stack": lambda x, g: torch.stack(x.chunk(g, 1), 2).flatten(1, 2),
    "blocks": lambda x, g: x.unflatten(1, (g, -1)).flip(1).flatten(1, 2),
    "mean": lambda x, g: x.unflatten(1, (g, -1)).mean(1),
    "weighted": lambda x, g: (x.unflatten(1, (g, -1)).softmax(1) * x.unflatten(1, (g, -1))).sum(1),
}


class Shuffle(Block):
    """Channels of several groups mixed by a transposition, or summed over the groups."""

    worlds = ("maps",)
    draws = {"groups": st.integers(2, 4), "how": st.sampled_from(list(SHUFFLES))}

    def __init__(self, at: Place, groups: int = 2, how: str = "view") -> None:
        super().__init__(at)
        self.groups, self.how = divisor(at.width, groups), how
        self.out = at.but(width=SHUFFLES[how](at.sample(), self.groups).shape[1])

    def forward(self, x: Tensor) -> Tensor:
        return SHUFFLES[self.how](x, self.groups)

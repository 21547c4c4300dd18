"""Places: positions, changes of resolution, feature maps as tokens and windows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.fuzz.block import Block, Place, Spec
from tests.fuzz.layers import pointwise_layer


class Position(Block):
    """A learned number for each channel at each place."""

    fixed = True
    draws = {"how": st.sampled_from(["add", "mul", "cat"])}

    def __init__(self, at: Place, how: str = "add") -> None:
        super().__init__(at)
        self.how = how
        self.place = nn.Parameter(torch.randn_like(at.sample()[:1]))
        self.out = at.but(width=2 * at.width) if how == "cat" else at

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "cat":
            return torch.cat([x, self.place.expand_as(x)], self.dim)
        return x + self.place if self.how == "add" else x * self.place


class Coordinates(Block):
    """Two more channels that say where a place is."""

    worlds = ("maps",)

    def __init__(self, at: Place) -> None:
        super().__init__(at)
        self.out = at.but(width=at.width + 2)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-1]
        line = torch.arange(size, dtype=x.dtype).div(size).expand_as(x[:, :1])
        return torch.cat([x, line, line**2], 1)


class Pool(Block):
    """Pooling and other changes of resolution that leave channels alone."""

    worlds = ("maps",)
    draws = {
        "how": st.sampled_from(["max", "avg", "avg_padded", "adaptive", "lp", "nearest", "linear",
                                "pad", "reflect", "ones", "crop", "ceil"])
    }  # fmt: skip

    def __init__(self, at: Place, how: str = "max") -> None:
        super().__init__(at)
        small = how == "avg_padded" and min(at.space) < 3  # torch refuses a kernel of 3 there
        self.how = "avg" if small else how
        self.out = at.but(space=tuple(self(at.sample()).shape[2:]))

    def forward(self, x: Tensor) -> Tensor:
        n, k = len(self.at.space), 2 if min(self.at.space) > 1 else 1
        max_pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[n - 1]
        avg_pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[n - 1]
        match self.how:
            case "max":
                return max_pool(x, k)
            case "ceil":
                return max_pool(x, 3, stride=2, padding=1, ceil_mode=True)
            case "avg":
                return avg_pool(x, k)
            case "avg_padded":
                return avg_pool(x, 3, stride=1, padding=1)
            case "adaptive":
                return (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[n - 1](
                    x, 2
                )
            case "lp":
                return x if n == 3 else (F.lp_pool1d, F.lp_pool2d)[n - 1](x.abs() + 0.1, 2, k)
            case "nearest":
                return F.interpolate(x, scale_factor=2)
            case "linear":
                mode = ("linear", "bilinear", "trilinear")[n - 1]
                return F.interpolate(x, scale_factor=2, mode=mode, align_corners=False)
            case "pad":
                return F.pad(x, (1, 0) * n)
            case "reflect":
                return F.pad(x, (0, 1) * n, mode="replicate" if k == 1 else "reflect")
            case "ones":
                return F.pad(x, (1, 1), value=1.0)
            case _:
                return x[..., :-1] if self.at.space[-1] > 1 else x


class PixelShuffle(Block):
    """Channels become pixels, or pixels channels."""

    worlds = ("maps",)
    draws = {"down": st.booleans(), "by_hand": st.booleans()}

    def __init__(self, at: Place, down: bool = False, by_hand: bool = False) -> None:
        super().__init__(at)
        self.down, self.by_hand = down and all(n % 2 == 0 for n in at.space), by_hand
        flat = len(at.space) == 2
        self.fit: nn.Module = nn.Identity()
        if flat and not self.down and at.width % 4:
            self.fit = pointwise_layer(at, 4)
        shape = self(at.sample()).shape
        self.out = at.but(width=shape[1], space=tuple(shape[2:]))
        self.fixed = self.down

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            return x
        x = self.fit(x)
        if not self.by_hand:
            return F.pixel_unshuffle(x, 2) if self.down else F.pixel_shuffle(x, 2)
        n, c, h, w = x.shape
        if self.down:
            y = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)
            return y.reshape(n, 4 * c, h // 2, w // 2)
        y = x.reshape(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
        return y.reshape(n, c // 4, 2 * h, 2 * w)


class Tokens(Block):
    """Places of a feature map as tokens, and back."""

    worlds = ("maps",)
    nests = {"inner": "tokens"}

    def __init__(self, at: Place, inner: tuple[Spec, ...] = ()) -> None:
        super().__init__(at)
        self.body, out = self.chain(inner, Place(at.width, (math.prod(at.space),), True))
        self.out = at.but(width=out.width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x.flatten(2).transpose(1, 2))
        return y.transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])


class Windows(Block):
    """Tokens in windows of 2 by 2, perhaps shifted, as in a Swin transformer."""

    worlds = ("maps",)
    nests = {"inner": "tokens"}
    draws = {"shift": st.booleans()}

    def __init__(self, at: Place, inner: tuple[Spec, ...] = (), shift: bool = False) -> None:
        super().__init__(at)
        self.shift, self.flat = shift, len(at.space) == 2
        if self.flat:
            self.body, out = self.chain(inner, Place(at.width, (4,), True))
            self.out = at.but(width=out.width)

    def forward(self, x: Tensor) -> Tensor:
        if not self.flat:
            return x
        x = x.permute(0, 2, 3, 1)
        n, h, w, _ = x.shape
        x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
        if self.shift:
            x = torch.roll(x, (-1, -1), dims=(1, 2))
        n, hh, ww, c = x.shape
        x = x.view(n, hh // 2, 2, ww // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        x = self.body(x)
        x = x.view(n, hh // 2, ww // 2, 2, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(n, hh, ww, -1)
        if self.shift:
            x = torch.roll(x, (1, 1), dims=(1, 2))
        return x[:, :h, :w].permute(0, 3, 1, 2)

"""The short ways to shapes end where torch's own do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import demp_fx
from demp_fx.shapes import SHAPES

aten = torch.ops.aten


def blank(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "permuted": lambda x: x.permute(0, 2, 3, 1),
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "expanded": lambda x: x[:, :1].expand(-1, 8, -1, -1),
    "with gaps": lambda x: x[:, :, ::2],
}
OTHERS = {
    aten.cat.default, aten.convolution.default, aten.native_batch_norm.default,
    aten.native_layer_norm.default, aten.addmm.default, aten.mm.default, aten.bmm.default,
}  # fmt: skip
MORE: dict[Any, tuple[Any, ...]] = {
    aten.clamp_min.default: (0.1,),
    aten._softmax.default: (-1, False),
    aten._log_softmax.default: (1, False),
    aten._safe_softmax.default: (-1,),
    aten.mean.dim: ([2, -1], True),
    aten.sum.dim_IntList: ([1],),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", [op for op in SHAPES if op not in OTHERS], ids=str)
def test_ops_on_one_tensor_or_two_alike(op: Any, layout: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.int64):
        x = LAYOUTS[layout](blank(2, 8, 4, 6, dtype=dtype))
        more = MORE[op] if op in MORE else {"Tensor": (x,), "Scalar": (2.0,)}.get(str(op)[-6:], ())
        try:
            there = op(x, *more)
        except (RuntimeError, NotImplementedError, ValueError):  # not on integers
            continue
        here = SHAPES[op]((x, *more))
        assert (here.shape, here.dtype) == (there.shape, there.dtype)
        assert here.stride() == there.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_normalisation(layout: str) -> None:
    x = LAYOUTS[layout](blank(2, 8, 4, 6))
    statistics = [blank(x.size(1)) for _ in range(4)]
    for op, more in (
        (aten.native_layer_norm.default, ([x.size(-1)], None, None, 1e-5)),
        (aten.native_batch_norm.default, (*statistics, False, 0.1, 1e-5)),
    ):
        here, there = SHAPES[op]((x, *more))[0], op(x, *more)[0]
        assert (here.shape, here.stride()) == (there.shape, there.stride())


class Channels(nn.Module):
    """A layer norm over channels, as convnets have it, and a head that views its result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 1), nn.LayerNorm(4), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return self.head(y.view(-1, 64))  # type: ignore[no-any-return]


def test_what_a_layer_norm_gives_is_contiguous() -> None:
    torch.manual_seed(0)
    demp_fx.compile(Channels(), torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.BatchNorm2d(7)], ids=["layer", "batch"])
def test_a_norm_of_another_size_is_refused_where_it_stands(norm: nn.Module) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), norm)
    with pytest.raises(demp_fx.errors.UsageError, match=r"node '_1'.* refuses inputs of shape"):
        demp_fx.compile(net, torch.randn(1, 3, 4, 4))

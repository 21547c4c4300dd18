"""Sizes in a model's code: rewritten where they are sizes, kept where they are numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import demp_fx
from demp_fx.channels.analysis import walk
from demp_fx.errors import UsageError


class Sized(nn.Module):
    """Linear - function - linear, with channels 1, 4 and 6 of eight dead."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.make, self.read = nn.Linear(5, 8), nn.Linear(width, 3)
        with torch.no_grad():
            self.make.weight[[1, 4, 6]] = 0
            self.make.bias[[1, 4, 6]] = 0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.function(self.make(x)))


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "view_literal": lambda x: x.view(-1, 4, 8),
    "view_of_a_shape": lambda x: x.view(x.shape[0] // 2, 2, x.shape[1], x.shape[2]),
    "view_of_a_computed_shape": lambda x: x.view(x.size()[:-1] + torch.Size([8])),
    "reshape_to_a_computed_shape": lambda x: torch.reshape(x, (*x.shape[:1], -1) + x.shape[2:]),  # noqa: RUF005
    "reshape_tuple": lambda x: torch.reshape(x, (-1, 8)),
    "expand": lambda x: x.unsqueeze(0).expand(2, -1, -1, 8),
    "chunk": lambda x: torch.cat(x.chunk(2, -1), -1),
    "torch_chunk_dim": lambda x: torch.cat(torch.chunk(x, 4, dim=2), 2),
    "chunks_by_name": lambda x: torch.cat(torch.chunk(x, dim=2, chunks=2), 2),
    "all_by_name": lambda x: torch.cat(torch.chunk(input=x, chunks=4, dim=-1), 2),
    "chunk_method_by_name": lambda x: torch.cat(x.chunk(chunks=2, dim=2), 2),
    "split_int": lambda x: torch.cat(x.split(4, dim=-1), -1),
    "split_list": lambda x: torch.cat(torch.split(x, [2, 5, 1], dim=-1), -1),
    "slices": lambda x: torch.cat([x[..., 2:7], x[..., :2], x[:, :, 7:]], -1),
    "negative_slice": lambda x: torch.cat([x[..., :-3], x[..., -3:]], -1),
    "narrow": lambda x: torch.cat([x.narrow(-1, 0, 3), x.narrow(-1, 3, 5)], -1),
    "new_axis": lambda x: x[:, None, :, :8],
    "scaled_by_width": lambda x: x * x.shape[-1] ** -0.5,
    "scaled_by_size": lambda x: x / x.size(-1),
    "scaled_by_both": lambda x: x * x.shape[0] * (x.shape[2] + 1),
    "constants": lambda x: torch.einsum("bnc,c->bnc", x, torch.ones(8, dtype=x.dtype)),
    "padded_space": lambda x: F.pad(x, (0, 0, 1, 1)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_sizes_follow_and_numbers_stay(name: str) -> None:
    model = Sized(FUNCTIONS[name])
    result = demp_fx.compile(model, torch.randn(4, 4, 5).double())
    assert result.module.get_parameter("make.weight").shape[0] == 5
    for batch in (4, 8):
        x = torch.randn(batch, 4, 5).double()
        assert torch.allclose(result.module(x), model(x), atol=1e-12)


def test_a_size_that_the_code_insists_on_keeps_the_channels() -> None:
    def check(x: Tensor) -> Tensor:
        return torch.einsum("bnc,c->bnc", x, torch.hann_window(8, dtype=x.dtype))

    model = Sized(check)
    result = demp_fx.compile(model, torch.randn(4, 4, 5).double())
    assert result.module.get_parameter("make.weight").shape[0] == 8
    assert any("make.weight[0]" in pin.members for pin in result.report.pinned)


class PerImage(nn.Module):
    """Every image gets a convolution of its own: the batch lies within the channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make, self.read = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 2, 1)
        self.choose, self.kernels = nn.Linear(3, 2), nn.Parameter(torch.randn(2, 4 * 8))
        with torch.no_grad():
            self.make.weight[[1, 4, 6]] = 0
            self.make.bias[[1, 4, 6]] = 0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        made = self.make(x)
        images, channels, height, width = made.shape
        kernels = (self.choose(x.mean((2, 3))) @ self.kernels).view(images * 4, 8, 1, 1)
        merged = made.reshape(1, images * channels, height, width)
        mixed = F.conv2d(merged, kernels, groups=images)
        return self.read(mixed.view(images, 4, height, width))


@pytest.mark.parametrize("images", [1, 2])
def test_a_batch_within_the_channels_stays_free(images: int) -> None:
    model = PerImage()
    result = demp_fx.compile(model, torch.randn(images, 3, 5, 5).double())
    if images == 1:
        assert result.module.get_parameter("make.weight").shape[0] == 5
    for batch in (1, 3):
        x = torch.randn(batch, 3, 5, 5).double()
        assert torch.allclose(result.module(x), model(x), atol=1e-12)


class HeadsWithinTheBatch(nn.Module):
    """Attention on "(b h) n d", its sizes worked out; a head and some dims are dead."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make, self.read = nn.Linear(5, 3 * 16, bias=False), nn.Linear(16, 3)
        with torch.no_grad():
            self.make.weight.view(3, 4, 4, 5)[:, 0] = 0
            self.make.weight.view(3, 4, 4, 5)[:, :, 1] = 0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(self.merged, self.make(x).chunk(3, -1))
        mixed = (q @ k.transpose(1, 2)).softmax(-1) @ v
        merged, tokens, width = mixed.shape
        apart = mixed.reshape(merged // 4, 4, tokens, width).permute(0, 2, 1, 3)
        return self.read(apart.reshape(1 * (merged // 4), 1 * tokens, 4 * width))

    def merged(self, x: Tensor) -> Tensor:
        images, tokens, width = x.shape
        heads = x.reshape(images, tokens, 4, width // 4).permute(0, 2, 1, 3)
        return heads.reshape(1 * images * 4, 1 * tokens, 1 * (width // 4))


def test_heads_within_the_batch_leave_it_free() -> None:
    model = HeadsWithinTheBatch()
    result = demp_fx.compile(model, torch.randn(2, 6, 5).double())
    assert result.module.get_parameter("make.weight").shape[0] == 3 * 3 * 3
    for images, tokens in ((1, 6), (3, 7)):
        x = torch.randn(images, tokens, 5).double()
        assert torch.allclose(result.module(x), model(x), atol=1e-12)


class HeadsInTheBatch(nn.Module):
    """Attention of four heads by `bmm`: the code computes how many there are in the batch, and
    leaves the number of tokens to torch. All of the first head is dead."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = (nn.Linear(8, 16) for _ in range(3))
        self.read = nn.Linear(16, 8)
        with torch.no_grad():
            for layer in (self.query, self.key, self.value):
                layer.weight[:4] = 0
                layer.bias[:4] = 0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        query, key, value = (
            layer(x).view(batch, tokens, 4, 4).transpose(1, 2).reshape(batch * 4, -1, 4)
            for layer in (self.query, self.key, self.value)
        )
        heads = torch.bmm(torch.bmm(query, key.mT).softmax(-1), value)
        return self.read(heads.view(batch, 4, tokens, 4).transpose(1, 2).reshape(batch, tokens, 16))


def test_tokens_are_left_to_torch_beside_heads_within_the_batch() -> None:
    model = HeadsInTheBatch()
    result = demp_fx.compile(model, torch.randn(2, 5, 8).double())
    assert result.module.get_parameter("value.weight").shape[0] == 12
    for batch, tokens in ((1, 5), (3, 7)):
        x = torch.randn(batch, tokens, 8).double()
        assert torch.allclose(result.module(x), model(x), atol=1e-12)


COUNTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda x, f: x / (f.shape[1] * f.shape[2] * f.shape[3]),
    "product_with_the_batch": lambda x, f: x / (f.size(0) * f.size(1) * f.size(2)),
    "whole_shape": lambda x, f: x / math.prod(f.shape[1:]),
    "numel": lambda x, f: x / f.numel(),
    "numel_of_one": lambda x, f: x / f[0].numel(),
    "numel_of_a_shape": lambda x, f: x / f.shape[1:].numel(),
    "numel_of_sizes": lambda x, f: x / f.size().numel(),
    "torch_numel": lambda x, f: x / torch.numel(f[0]),
    "twice": lambda x, f: x / (f.shape[1] * f.shape[2]) + 1 / (f.shape[1] * f.shape[2]),
    "root": lambda x, f: x / math.sqrt(f.shape[1] * f.shape[3]),
}


@pytest.mark.parametrize("name", COUNTED)
def test_numbers_keep_the_old_width_and_follow_the_image(name: str) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.make, self.read = nn.Conv2d(3, 8, 1), nn.Linear(8, 2)
            with torch.no_grad():
                self.make.weight[[1, 4, 6]] = 0
                self.make.bias[[1, 4, 6]] = 0
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            made = self.make(x).relu()
            return self.read(COUNTED[name](made.flatten(2).sum(2), made))

    model = Counts()
    result = demp_fx.compile(model, torch.randn(2, 3, 4, 4).double())
    assert result.module.get_parameter("make.weight").shape[0] == 5
    replayed = demp_fx.passes.narrow(
        demp_fx.trace(model, torch.randn(2, 3, 4, 4).double()),
        type(result.plan).from_json(result.plan.to_json()),
    )
    for images, side in ((2, 4), (3, 6)):
        x = torch.randn(images, 3, side, side).double()
        assert torch.allclose(result.module(x), model(x), atol=1e-12)
        assert torch.allclose(replayed(x), model(x), atol=1e-12)


FLATTENED: dict[str, Callable[[Tensor], Tensor]] = {
    "numel_of_sizes": lambda x: x.view(-1, x.size()[1:].numel()),
    "numel_of_one": lambda x: x.view(-1, x[0].numel()),
    "torch_numel": lambda x: x.view(-1, torch.numel(x[0])),
    "numel_by_batch": lambda x: x.view(-1, x.numel() // x.size(0)),
    "product": lambda x: x.view(-1, math.prod(x.shape[1:])),
}


@pytest.mark.parametrize("name", FLATTENED)
def test_a_count_that_is_a_size_follows(name: str) -> None:
    class Flattens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.make, self.read = nn.Conv2d(3, 8, 1), nn.Linear(8 * 16, 2)
            with torch.no_grad():
                self.make.weight[[1, 4, 6]] = 0
                self.make.bias[[1, 4, 6]] = 0
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.read(FLATTENED[name](self.make(x).relu()))

    model = Flattens()
    result = demp_fx.compile(model, torch.randn(2, 3, 4, 4).double())
    assert result.module.get_parameter("read.weight").shape[1] == 5 * 16
    assert not result.plan.spreads
    x = torch.randn(3, 3, 4, 4).double()
    assert torch.allclose(result.module(x), model(x), atol=1e-12)


FILLED: dict[str, Callable[[Tensor, int], Tensor]] = {
    "new": lambda h, n: h + h.new_full((1, 1, 8), n),
    "like": lambda h, n: torch.where(h == 0, torch.full_like(h, n), h),
    "number": lambda h, n: torch.where(h == 0, n, h),
    "masked": lambda h, n: h.masked_fill(h == 0, n),
}


@pytest.mark.parametrize("name", FILLED)
def test_a_number_that_is_a_size_of_the_input_is_no_constant(name: str) -> None:
    model = Sized(lambda h: FILLED[name](h, h.size(1)))
    narrow = demp_fx.compile(model, torch.randn(2, 4, 5).double()).module
    x = torch.randn(2, 7, 5).double()
    assert torch.allclose(narrow(x), model(x), atol=1e-12)


class Picking(nn.Module):
    """Channels 0 and 1 of six are zero, and some of all are picked before the next layers."""

    def __init__(self, pick: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pick = pick
        self.make, self.read, self.give = nn.Conv2d(3, 6, 1), nn.Linear(6, 4), nn.Linear(4, 2)
        with torch.no_grad():
            self.make.weight[:2] = 0
            self.make.bias[:2] = 0
        self.double()

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        picked = self.pick(self.make(x).relu(), index)
        result: Tensor = self.give(self.read(picked).relu())
        return result


PICKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "which_channels": lambda h, index: h.mean((2, 3)).index_select(1, index),
    "places_of_an_image": lambda h, _: h.flatten(1)[:, torch.tensor([5, 2, 9, 0, 7, 1])],
}


@pytest.mark.parametrize("name", PICKS)
def test_what_is_picked_is_not_known_before_the_input_is(name: str) -> None:
    model = Picking(PICKS[name])
    result = demp_fx.compile(model, (torch.randn(2, 3, 2, 2).double(), torch.arange(6)))
    for side, index in ((2, torch.arange(6).flip(0)), (4, torch.tensor([3, 3, 0, 1, 1, 4]))):
        x = torch.randn(2, 3, side, side).double()
        assert torch.allclose(result.module(x, index), model(x, index), atol=1e-12)
    assert any("looked up" in pin.reason for pin in result.report.pinned)


def test_all_nodes_that_refuse_their_sizes_are_found_in_one_walk() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.c(self.b(self.a(x).view(-1, 8)).view(-1, 2, 4).flatten(1))
            return result

    graph = demp_fx.trace(Views(), torch.zeros(3, 4))
    for name, narrow in (("a", nn.Linear(4, 7)), ("b", nn.Linear(8, 7))):
        graph.set_submodule(name, narrow)
    sizes = {"view": (3, 8), "view_1": (3, 2, 4)}
    planned = {name: torch.empty(size, device="meta") for name, size in sizes.items()}
    walked = walk(graph, labelled=False, planned=planned)
    assert [node.name for node in walked.refused] == ["view", "view_1"]
    with pytest.raises(UsageError, match="view"):
        walk(graph, labelled=False)


def test_a_size_that_is_divided_by_what_may_be_left_of_another() -> None:
    class Divides(nn.Module):
        """Three channels are no four: nothing can be divided by how many fours there are."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.make, self.read = nn.Conv2d(3, 8, 1), nn.Linear(8, 2)
            with torch.no_grad():
                self.make.weight[3:] = 0
                self.make.bias[3:] = 0
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            made = self.make(x).relu()
            fours = made.shape[1] // 4
            result: Tensor = self.read(made.view(-1, 8, fours, 16 // fours).amax(3).sum(2))
            return result

    model, x = Divides(), torch.randn(2, 3, 4, 4).double()
    torch.testing.assert_close(demp_fx.compile(model, x).module(x), model(x))


class Table(nn.Module):
    """A table of positions is cropped at the sizes of the input, however these are asked for."""

    def __init__(self, sizes: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make, self.read = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.table, self.sizes = nn.Parameter(torch.randn(8, 16, 16)), sizes
        self.double()
        with torch.no_grad():
            self.make.weight[::2] = self.make.bias[::2] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.make(x)
        height, width = self.sizes(x)
        result: Tensor = self.read(x * self.table[:, :height, :width])
        return result


SIZES: dict[str, Callable[[Tensor], Any]] = {
    "a part of the shape": lambda x: x.shape[-2:],
    "a part of all sizes": lambda x: x.size()[2:],
    "a list": lambda x: list(x.shape)[2:],
    "one by one": lambda x: (x.shape[2], x.size(3)),
    "computed": lambda x: (max(x.shape[2], 1), x.shape[3] * 2 // 2),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_table_has_what_other_inputs_read_of_it(name: str) -> None:
    model = Table(SIZES[name])
    narrow = demp_fx.compile(model, torch.randn(2, 3, 8, 8).double()).module
    assert narrow.get_parameter("table").shape == (4, 16, 16)
    x = torch.randn(3, 3, 10, 12).double()
    assert torch.allclose(narrow(x), model(x), atol=1e-12)


class Causal(nn.Module):
    """Attention of each token to those before it, by a mask that is cropped at their number."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.read = nn.Linear(12, 12), nn.Linear(12, 12)
        self.register_buffer("mask", torch.ones(16, 16).tril())

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.project(x).view(x.shape[0], -1, 3, 4).transpose(1, 2)
        scores = tokens @ tokens.mT
        mask = self.mask[: x.shape[1], : x.shape[1]]
        scores = scores.masked_fill(mask == 0, -torch.inf).softmax(-1)
        return x + self.read((scores @ tokens).transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("last", [False, True], ids=["all tokens", "the last one"])
def test_what_meets_a_cropped_mask_is_as_long_as_the_input_from_there_on(last: bool) -> None:
    torch.manual_seed(0)
    blocks = nn.Sequential(nn.Linear(5, 12), *(Causal() for _ in range(3))).double()
    with torch.no_grad():
        blocks[2].read.weight[::2] = blocks[2].read.bias[::2] = 0

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.head = blocks, nn.Linear(12, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks(x)
            result: Tensor = self.head(x[:, -1] if last else x)
            return result

    model = Reads()
    narrow = demp_fx.compile(model, torch.randn(2, 8, 5).double(), cuts="always").module
    assert narrow.get_parameter("blocks.2.read.weight").shape == (6, 12)
    for tokens in (8, 5, 16):
        x = torch.randn(3, tokens, 5).double()
        torch.testing.assert_close(narrow(x), model(x), rtol=1e-12, atol=1e-12)


class Slices(nn.Module):
    """Tokens of 12 channels each, side by side on one axis, of which a part is taken."""

    def __init__(self, part: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make, self.read, self.part = nn.Linear(5, 12), nn.Linear(12, 3), part
        with torch.no_grad():
            self.make.weight[::2] = self.make.bias[::2] = 0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.part(self.make(x).flatten(1))
        result: Tensor = self.read(tokens.reshape(x.shape[0], -1, 12))
        return result


PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda x: x[:, 0 : x.shape[1]],
    "all but the first": lambda x: x[:, 12:],
    "all but the last": lambda x: x[:, :-12],
    "the last": lambda x: x[:, -12:],
    "the first two": lambda x: x[:, :24],
    "one of even parts": lambda x: x.split(36, 1)[1],
}
HALVES: dict[str, Callable[[Tensor], Tensor]] = {
    "first half": lambda x: x[:, : x.shape[1] // 2],
    "second half": lambda x: x[:, x.shape[1] // 2 :],
    "narrowed": lambda x: x.narrow(1, 0, x.shape[1] // 2),
    "split": lambda x: x.split(x.shape[1] // 2, 1)[1],
    "chunk": lambda x: x.chunk(2, 1)[0],
}


@pytest.mark.parametrize("name", [*PARTS, *HALVES])
def test_parts_of_tokens_on_one_axis_are_those_of_any_number_of_tokens(name: str) -> None:
    model = Slices((PARTS | HALVES)[name])
    narrow = demp_fx.compile(model, torch.randn(2, 8, 5).double()).module
    for tokens in (8, 4, 16):
        x = torch.randn(3, tokens, 5).double()
        torch.testing.assert_close(narrow(x), model(x), rtol=1e-12, atol=1e-12)
    # where half of them ends depends on how many there are
    assert narrow.get_parameter("make.weight").shape[0] == (12 if name in HALVES else 6)

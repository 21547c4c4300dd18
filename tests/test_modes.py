"""Code that asks for train or eval mode, draws at random, or knows one dtype only."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal

import demp_fx
from demp_fx.errors import VerificationError


class DropPath(nn.Module):
    """Residual branches left out at random, sample by sample; without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mask = (0.9 + torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype)).floor()
        return x.div(0.9) * mask


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = nn.Linear(5, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.drop, self.head = DropPath(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.drop(self.outer(self.inner(x).relu()))
        result: Tensor = self.head(self.drop(x))
        return result


def _half_dead(net: Residual) -> Residual:
    with torch.no_grad():
        net.inner.weight[:6] = 0
        net.inner.bias[:6] = -1
        net.head.weight[:, :2] = 0
    return net


@pytest.mark.parametrize("training", [False, True])
def test_a_module_without_parameters_may_go_two_ways(training: bool) -> None:
    torch.manual_seed(0)
    net = _half_dead(Residual().double()).train(training)
    x = torch.randn(6, 5, dtype=torch.float64)
    result = demp_fx.compile(net, (x,), cuts="always")
    narrow = result.module
    assert result.report.opaque == {}
    assert narrow.get_submodule("inner").weight.shape[0] == 6
    assert result.report.verification is not None
    assert result.report.verification.train_error is not None
    for mode in (False, True):
        torch.manual_seed(1)
        expected = net.train(mode)(x)
        torch.manual_seed(1)
        torch.testing.assert_close(narrow.train(mode)(x), expected, rtol=1e-12, atol=1e-12)


def test_what_is_constant_in_eval_mode_alone_stays() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.drop, self.head = nn.Linear(5, 8), DropPath(), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(self.drop(self.inner(x)))
            return result

    torch.manual_seed(0)
    net = Dropped().double()
    with torch.no_grad():
        net.inner.weight[:4] = 0
        net.inner.bias[:2] = 0  # two zeros, two constants that are sometimes left out
    x = torch.randn(6, 5, dtype=torch.float64)
    narrow = demp_fx.compile(net, (x,)).module
    assert narrow.get_submodule("inner").weight.shape[0] == 6
    torch.manual_seed(1)
    expected = net.train()(x)
    torch.manual_seed(1)
    torch.testing.assert_close(narrow.train()(x), expected, rtol=1e-12, atol=1e-12)


class Shifted(nn.Module):
    """Another constant in train mode: one channel stays to carry it."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if self.training else x


class Fewer(nn.Module):
    """Half of the tokens in train mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : x.shape[1] // 2] if self.training else x


class Turned(nn.Module):
    """Other channels in train mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1) if self.training else x


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("module", "width"), [(Shifted(), 5), (Fewer(), 4), (Turned(), 8)])
def test_a_module_may_be_another_in_train_mode(
    module: nn.Module, width: int, training: bool
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), module, nn.Linear(8, 3)).double().train(training)
    with torch.no_grad():
        net[0].weight[:4] = 0
        net[0].bias[:4] = 0
    narrow = demp_fx.compile(net, torch.randn(2, 6, 5, dtype=torch.float64)).module
    assert narrow.get_submodule("2").weight.shape[1] == width
    x = torch.randn(3, 8, 5, dtype=torch.float64)
    for mode in (False, True):
        found, expected = narrow.train(mode)(x), net.train(mode)(x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_noise_drawn_at_the_width_of_a_layer_does_not_hinder_the_comparison() -> None:
    class Noisy(Residual):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.inner(self.stem(x)).relu()
            hidden = hidden * torch.empty_like(hidden).uniform_(0.5, 1.5)
            hidden = hidden + hidden * torch.randn_like(hidden)
            drawn = Normal(self.head(self.outer(hidden)), 2.0).sample()
            return torch.poisson(drawn.exp())

    torch.manual_seed(0)
    net, x = _half_dead(Noisy()), torch.randn(6, 5)
    result = demp_fx.compile(net, (x,))
    assert result.module.get_submodule("inner").weight.shape[0] == 6


def test_noise_divided_by_how_much_it_varies_does_not_hinder_the_comparison() -> None:
    class Scaled(Residual):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.inner(self.stem(x)).relu()
            noise = torch.randn(hidden.shape[0], 1, dtype=hidden.dtype)
            noise = (noise - noise.min()) / (noise.max() - noise.min())
            result: Tensor = self.head(self.outer(hidden * (1 + noise)))
            return result

    torch.manual_seed(0)
    result = demp_fx.compile(_half_dead(Scaled()), (torch.randn(6, 5),))
    assert result.module.get_submodule("inner").weight.shape[0] == 6
    assert not result.report.warnings


class Masked(Residual):
    """A network that is defined where its inputs are positive, and gives infinities for some."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.outer(self.inner(self.stem(x.sqrt())).relu()))
        return result.masked_fill(x[:, :1] < self.limit, -torch.inf)


def test_outputs_may_be_infinite() -> None:
    torch.manual_seed(0)
    net, x = _half_dead(Masked(0.5)), torch.rand(6, 5)
    report = demp_fx.compile(net, (x,)).report
    assert report.verification is not None
    assert report.verification.eval_error < 1e-9
    assert not report.warnings


def test_an_original_that_gives_nan_is_named_as_the_reason() -> None:
    with pytest.raises(VerificationError, match=r"the original's own output .* none \(nan\)"):
        demp_fx.compile(_half_dead(Masked(-1.0)), (-torch.rand(6, 5),))


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "gumbel_softmax": lambda x: F.gumbel_softmax(x @ x.mT, dim=-1, hard=True) @ x,
    "randperm": lambda x: x[:, torch.randperm(x.shape[1])] + x,
    "randint": lambda x: x * torch.randint(1, 9, (x.shape[1], 1)),
    "multinomial": lambda x: x[:, torch.ones(x.shape[1]).multinomial(2)],
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_that_decide_do_not_hinder_the_comparison(name: str) -> None:
    class Draws(Residual):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(self.outer(DRAWS[name](self.inner(self.stem(x)).relu())))
            return result

    torch.manual_seed(0)
    net = _half_dead(Draws())
    result = demp_fx.compile(net, torch.randn(2, 6, 5))
    assert result.module.get_submodule("inner").weight.shape[0] == 6


DRAWN_INDICES: dict[str, Any] = {
    "weighted": lambda x: torch.multinomial(torch.ones(x.shape[0]), 4),
    "weighted, in rows": lambda x: torch.multinomial(torch.ones(2, x.shape[0]), 3)[1],
    "again and again": lambda x: torch.multinomial(x.new_ones(3), 9, replacement=True),
    "shuffled": lambda x: torch.randperm(x.shape[0]),
    "any": lambda x: torch.randint(x.shape[0], (4,)),
    "of some": lambda x: torch.randint(1, x.shape[0], (4,)),
}


@pytest.mark.parametrize("draw", DRAWN_INDICES)
def test_indices_that_are_drawn_do_not_hinder_the_comparison(draw: str) -> None:
    class Masked(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            kept = x[DRAWN_INDICES[draw](x)]
            result: Tensor = self.head(self.outer(self.inner(kept).relu()))
            return result

    torch.manual_seed(0)
    net, x = _half_dead(Masked()), torch.randn(6, 5)
    result = demp_fx.compile(net, (x,))
    assert result.module.get_submodule("inner").weight.shape[0] == 6


NOISES: dict[str, Any] = {
    "rand": lambda: torch.rand(8),
    "randn": lambda: torch.randn(1, 8),
    "normal": lambda: torch.normal(0.0, 1.0, (8,)),
    "one for all": lambda: torch.rand(()),
}


@pytest.mark.parametrize("draw", NOISES)
def test_a_draw_that_has_nothing_to_do_with_the_input_is_drawn_at_each_call(draw: str) -> None:
    class Noisy(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            result: Tensor = self.head(self.outer(self.inner(x).relu()) + NOISES[draw]())
            return result

    torch.manual_seed(0)
    net, x = _half_dead(Noisy()), torch.randn(6, 5)
    result = demp_fx.compile(net, (x,))
    assert result.module.get_submodule("inner").weight.shape[0] == 6
    assert not torch.equal(result.module(x), result.module(x))
    if draw in ("rand", "randn"):  # fewer are drawn, of the same kind
        runs = [torch.stack([module(x) for _ in range(2000)]) for module in (net, result.module)]
        means, spreads = ([statistic(r, 0) for r in runs] for statistic in (torch.mean, torch.std))
        torch.testing.assert_close(*means, rtol=0.1, atol=0.1)
        torch.testing.assert_close(*spreads, rtol=0.1, atol=0.1)
        return
    torch.manual_seed(1)
    expected = net(x)
    torch.manual_seed(1)
    torch.testing.assert_close(result.module(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_the_way_of_one_mode_is_kept_and_said(training: bool) -> None:
    class Auxiliary(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            if self.training:
                x = x * self.head.weight.sum()
            result: Tensor = self.head(self.outer(self.inner(x).relu()))
            return result

    torch.manual_seed(0)
    net, x = _half_dead(Auxiliary()).train(training), torch.randn(6, 5)
    report = demp_fx.compile(net, (x,)).report
    assert any("if self.training:" in line for line in report.warnings)


class SinglePrecision(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise RuntimeError("this kernel is for float32")
        return x * 2


class OnlySingle(Residual):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(self.stem(x)).relu()
        result: Tensor = self.head(SinglePrecision.apply(self.outer(hidden)))  # type: ignore[no-untyped-call]
        return result


def test_kernels_without_float64_are_compared_in_their_own_dtype() -> None:
    torch.manual_seed(0)
    net, x = _half_dead(OnlySingle()), torch.randn(6, 5)
    verification = demp_fx.compile(net, (x,)).report.verification
    assert verification is not None
    assert 1e-6 < verification.tolerance < 1e-3
    assert verification.eval_error <= verification.tolerance


def test_a_difference_is_found_in_any_dtype() -> None:
    torch.manual_seed(0)
    net, x = _half_dead(OnlySingle()), torch.randn(6, 5)
    narrow = demp_fx.compile(net, (x,)).module
    with torch.no_grad():
        narrow.get_parameter("head.bias")[0] += 0.01
    with pytest.raises(VerificationError, match="differs"):
        demp_fx.passes.verify(net, narrow, (x,))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_a_hook_computes_are_compared_too() -> None:
    class Normed(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.outer = nn.utils.weight_norm(self.outer)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(self.outer(self.inner(self.stem(x)).relu()))
            return result

    torch.manual_seed(0)
    net, x = _half_dead(Normed()), torch.randn(6, 5)
    result = demp_fx.compile(net, (x,))
    assert result.report.verification is not None
    assert result.report.verification.eval_error <= 1e-9
    torch.testing.assert_close(result.module(x), net(x))


def test_dice_that_are_not_torchs_are_told_from_a_wrong_result() -> None:
    class Throws(Residual):
        dice = itertools.count()

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.inner(self.stem(x)).relu()
            if self.training:
                hidden = hidden * next(self.dice)
            result: Tensor = self.head(self.outer(hidden))
            return result

    torch.manual_seed(0)
    net, x = _half_dead(Throws().double()).train(), torch.randn(6, 5).double()
    with pytest.raises(VerificationError, match="random numbers that are not torch's"):
        demp_fx.compile(net, (x,))


class Frozen(nn.Module):
    """The statistics of its first norm stay what they are, and so does its weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.mix, self.free = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(0.5), nn.Conv2d(8, 2, 1)
        with torch.no_grad():
            for norm in (self.norm, self.free):
                norm.running_mean.normal_()  # type: ignore[union-attr]
                norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
                norm.weight[::2] = norm.bias[::2] = 0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.norm(self.stem(x)).relu())
        result: Tensor = self.head(self.drop(self.free(x).relu()))
        return result


class FrozenByTrain(Frozen):
    def train(self, mode: bool = True) -> FrozenByTrain:
        super().train(mode)
        self.norm.eval().requires_grad_(False)
        self.drop.eval()
        return self


class Exported(FrozenByTrain):
    """Symbolic tracing cannot take it: the class of a proxy is no tensor."""

    def forward(self, x: Tensor) -> Tensor:
        if not issubclass(type(x), Tensor):
            raise TypeError("not a tensor")
        return super().forward(x)


class FrozenByForward(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        self.norm.eval()
        self.drop.eval()
        return super().forward(x)


class AlwaysEvaluated(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        self.train(False)
        return super().forward(x)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", [FrozenByTrain, Exported, FrozenByForward, AlwaysEvaluated])
def test_a_layer_stays_in_the_mode_that_the_code_puts_it_in(
    kind: type[Frozen], training: bool
) -> None:
    net, x = kind().train(training), torch.randn(4, 3, 9, 9).double()
    frozen = [p.requires_grad for p in net.parameters()]
    narrow = demp_fx.compile(net, x).module
    assert [p.requires_grad for p in net.parameters()] == frozen
    assert narrow.get_parameter("mix.weight").shape == (4, 4, 3, 3)
    assert narrow.state_dict().keys() == net.state_dict().keys()
    for mode in (True, False):
        torch.testing.assert_close(narrow.train(mode)(x), net.train(mode)(x), rtol=1e-12, atol=0)
    for name, buffer in net.named_buffers():
        kept = narrow.get_buffer(name)
        if kept.dim():
            torch.testing.assert_close(kept, buffer[1::2], rtol=1e-12, atol=1e-12)


def test_a_layer_may_draw_in_eval_mode_too() -> None:
    class MonteCarlo(Frozen):
        def train(self, mode: bool = True) -> MonteCarlo:
            super().train(mode)
            self.drop.train()
            return self

    net, x = MonteCarlo().eval(), torch.randn(4, 3, 9, 9).double()
    narrow = demp_fx.compile(net, x).module.eval()
    assert narrow.get_parameter("mix.weight").shape == (4, 4, 3, 3)
    assert not torch.allclose(narrow(x), narrow(x), atol=0.01)

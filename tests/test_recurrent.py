"""Recurrent layers and cells: units that nothing is added to, or that nobody reads, go."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import demp_fx

KINDS: list[type[nn.RNNBase]] = [nn.LSTM, nn.GRU, nn.RNN]
CELLS: list[type[nn.RNNCellBase]] = [nn.LSTMCell, nn.GRUCell, nn.RNNCell]
WIDTH = 8


def silence(layer: nn.Module, units: list[int]) -> None:
    """Nothing is added to these units: the rows of the third gate, or of the only one, are zero."""
    gate = 0 if isinstance(layer, (nn.RNN, nn.RNNCell)) else 2
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if "weight_hr" not in name:
                weight[[gate * WIDTH + unit for unit in units]] = 0


def unread(layer: nn.Module, reader: nn.Linear, units: list[int]) -> None:
    """Neither the gates nor the next layer read these units."""
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if "weight_hh" in name:
                weight[:, units] = 0
        reader.weight[:, units] = 0


class Tagger(nn.Module):
    """An embedding, a recurrent layer, a head on what `use` takes of what it gives."""

    def __init__(self, kind: type[nn.RNNBase], use: str = "all", start: str = "", **more: Any):
        super().__init__()
        torch.manual_seed(0)
        self.use, self.start = use, start
        self.embed, self.rnn = nn.Linear(5, 7), kind(7, WIDTH, batch_first=True, **more)
        self.sides = 1 + self.rnn.bidirectional
        self.rows = self.rnn.num_layers * self.sides
        size = self.rnn.proj_size or WIDTH
        self.head = nn.Linear(size * (1 if use == "state" else self.sides), 6)
        self.out, self.first = nn.Linear(6, 3), nn.Linear(5, WIDTH)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        steps, lstm = self.embed(x).relu(), isinstance(self.rnn, nn.LSTM)
        shape = (self.rows, x.shape[0], WIDTH)
        if self.start == "zeros":
            first = torch.zeros(*shape, dtype=x.dtype)
        elif self.start == "ones":
            first = x.new_ones(*shape)
        elif self.start == "computed":
            first = self.first(x.mean(1)).unsqueeze(0)
        if self.start:
            given, state = self.rnn(steps, (first, first) if lstm else first)
        else:
            given, state = self.rnn(steps)
        if self.use == "last":
            given = given[:, -1]
        elif self.use == "state":
            given = (state[0] if lstm else state)[-1]
        result: Tensor = self.out(self.head(given).relu())
        return result


X = torch.randn(4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def narrowed(net: nn.Module, part: str, x: Tensor = X, **more: Any) -> Any:
    """The recurrent part of the narrow network, which does what the original does, for more and
    longer sequences, too."""
    result = demp_fx.compile(net, x, **more)
    longer = torch.cat([x, x * 0.5, x[:, :3] + 1], 1)[:3]
    torch.testing.assert_close(result.module(longer), net(longer), rtol=1e-10, atol=1e-12)
    result.module(x).sum().backward()
    return result.module.get_submodule(part)


@pytest.mark.parametrize("kind", KINDS)
def test_units_that_nothing_is_added_to_go(kind: type[nn.RNNBase]) -> None:
    net = Tagger(kind)
    silence(net.rnn, [1, 3, 5])
    rnn = narrowed(net, "rnn")
    assert type(rnn) is kind
    assert rnn.hidden_size == 5
    assert rnn.weight_hh_l0.shape == (rnn.weight_ih_l0.shape[0], 5)


@pytest.mark.parametrize("kind", KINDS)
def test_units_that_nobody_reads_go(kind: type[nn.RNNBase]) -> None:
    net = Tagger(kind)
    unread(net.rnn, net.head, [0, 7])
    assert narrowed(net, "rnn").hidden_size == 6


def test_a_unit_that_living_units_add_to_stays_and_one_that_only_silent_ones_do_goes() -> None:
    net = Tagger(nn.GRU)
    silence(net.rnn, [1, 3])
    with torch.no_grad():
        net.rnn.weight_hh_l0[2 * WIDTH + 1, 3] = 1  # from a silent one
        net.rnn.weight_hh_l0[2 * WIDTH + 3, 3] = 1  # from itself
    assert narrowed(net, "rnn").hidden_size == 6
    with torch.no_grad():
        net.rnn.weight_hh_l0[2 * WIDTH + 3, 0] = 1  # from a living one; and from there to the other
    assert narrowed(net, "rnn").hidden_size == 8


@pytest.mark.parametrize("kind", KINDS)
def test_all_layers_and_directions_keep_equally_many(kind: type[nn.RNNBase]) -> None:
    net = Tagger(kind, num_layers=2, bidirectional=True)
    silence(net.rnn, [1, 3, 5])
    with torch.no_grad():  # one of four cells has only two silent ones
        for name in ("bias_ih_l1", "bias_hh_l1"):
            net.rnn.get_parameter(name)[:] = 0.1
    silence(net.rnn, [1, 3])
    assert narrowed(net, "rnn").hidden_size == 6


@pytest.mark.parametrize(("start", "left"), [("zeros", 5), ("computed", 8), ("ones", 8)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_state_has_the_units_too(kind: type[nn.RNNBase], start: str, left: int) -> None:
    net = Tagger(kind, start=start)
    silence(net.rnn, [1, 3, 5])
    assert narrowed(net, "rnn").hidden_size == left
    unread(net.rnn, net.head, [1, 3, 5])
    assert narrowed(net, "rnn").hidden_size == 5
    assert kind is nn.RNN or start != "computed" or narrowed(net, "first").out_features == 5


def test_of_a_projected_lstm_the_projection_gets_narrower() -> None:
    net = Tagger(nn.LSTM, proj_size=4, num_layers=2)
    with torch.no_grad():
        for weight in (net.rnn.weight_hr_l0, net.rnn.weight_hr_l1):
            weight[:2] = 0
    rnn = narrowed(net, "rnn")
    assert (rnn.proj_size, rnn.hidden_size) == (2, WIDTH)


class Loop(nn.Module):
    """A cell that is called step by step."""

    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(5, 7)
        self.cell: Any = kind(7, WIDTH)  # type: ignore[call-arg]
        self.head = nn.Linear(WIDTH, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        steps, lstm = self.embed(x).relu(), isinstance(self.cell, nn.LSTMCell)
        state: Any = torch.zeros(x.shape[0], WIDTH, dtype=x.dtype)
        state = (state, state) if lstm else state
        for step in range(3):
            state = self.cell(steps[:, step], state)
        result: Tensor = self.head(state[0] if lstm else state)
        return result


@pytest.mark.parametrize("kind", CELLS)
def test_units_of_a_cell_go(kind: type[nn.RNNCellBase]) -> None:
    net = Loop(kind)
    silence(net.cell, [1, 3, 5])
    unread(net.cell, net.head, [0])
    with torch.no_grad():
        net.embed.weight[:2] = net.embed.bias[:2] = 0
    cell = narrowed(net, "cell")
    assert (type(cell), cell.input_size, cell.hidden_size) == (kind, 5, 4)


class Own(nn.LSTMCell):
    """A cell of somebody's own: it adds what it reads to all units."""

    def forward(self, x: Tensor, state: Any = None) -> Any:  # type: ignore[override]
        h, c = super().forward(x, state)
        return h + x[:, :1], c


@pytest.mark.parametrize("way", ["a class of its own", "weight norm"])
def test_cells_that_are_not_torchs_are_followed_op_by_op(way: str) -> None:
    net = Loop(nn.LSTMCell if way == "weight norm" else Own)
    if way == "weight norm":
        nn.utils.parametrizations.weight_norm(net.cell, "weight_hh")
    else:
        silence(net.cell, [1, 3])
    with torch.no_grad():
        net.embed.weight[5:] = net.embed.bias[5:] = 0
    assert narrowed(net, "embed").out_features == 5


@pytest.mark.parametrize("seed", range(12))
def test_of_random_recurrent_networks_what_is_left_is_exact(seed: int) -> None:
    chance = random.Random(seed)
    kind = KINDS[seed % 3]
    more: dict[str, Any] = {
        "num_layers": chance.choice([1, 2, 3]),
        "bidirectional": chance.random() < 0.4,
        "bias": chance.random() < 0.8,
    }
    net = Tagger(
        kind, chance.choice(["all", "last", "state"]), chance.choice(["", "zeros"]), **more
    )
    silence(net.rnn, chance.sample(range(WIDTH), chance.choice([2, 4, 8])))
    with torch.no_grad():
        net.embed.weight[:3] = 0
        net.embed.bias[:3] = torch.tensor([0.0, 0.5, -1.0])
    rnn = narrowed(net, "rnn", cuts=chance.choice(["pays", "always"]))
    assert rnn.hidden_size < WIDTH

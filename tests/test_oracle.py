"""The oracle of the zoo, on networks small enough to count by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.oracle import removable


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def kept(model: nn.Module, *shape: int) -> dict[str, int]:
    torch.manual_seed(0)
    return removable(model.double(), [x(*shape), x(*shape)]).kept


@torch.no_grad()
def zero(tensor: Tensor | None, indices: list[int]) -> None:
    assert tensor is not None
    tensor[indices] = 0.0


def test_a_living_network_keeps_everything() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 3))
    torch.manual_seed(0)
    assert removable(model.double(), [x(5, 4)]).removable == 0


def test_hidden_units_go_with_what_reads_them() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    zero(model[0].weight, [0, 1])
    zero(model[0].bias, [0, 1])
    assert kept(model, 5, 4) == {"0.weight": 16, "0.bias": 4, "2.weight": 12, "2.bias": 3}


def test_constants_fold_into_a_bias_but_not_past_padding() -> None:
    flat = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 3))
    padded = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 3, padding=1))
    for model in (flat, padded):
        nn.init.ones_(model[0].bias)
        zero(model[0].weight, [0, 1, 2])  # channels that hold ReLU(1)
    assert kept(flat, 2, 3, 5, 5)["2.weight"] == 2 * 3 * 9
    assert kept(padded, 2, 3, 5, 5)["2.weight"] == 2 * (3 + 1) * 9  # one stands for the constants


def test_a_dead_scale_of_a_layer_norm_frees_what_reads_it_and_not_the_stream() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    zero(model[1].weight, [0, 1])
    zero(model[1].bias, [0, 1])
    found = kept(model, 5, 4)
    assert found["0.weight"] == 24
    assert (found["1.weight"], found["1.bias"]) == (4, 4)
    assert found["2.weight"] == 12


def test_groups_need_as_much_as_the_one_that_needs_most() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1, groups=2), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1))
    for tensor in (model[1].weight, model[1].bias):
        zero(tensor, [0, 1, 2, 4])  # 3 of the first group's four, 1 of the second's
    found = kept(model, 4, 4, 3, 3)
    assert found["0.weight"] == 2 * 3 * 2
    assert found["0.bias"] == 4
    assert found["2.weight"] == 3 * 4


def test_a_group_without_life_goes() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1, groups=2), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1))
    for tensor in (model[1].weight, model[1].bias):
        zero(tensor, [0, 1, 2, 3])
    assert kept(model, 4, 4, 3, 3)["0.weight"] == 4 * 2


class Attention(nn.Module):
    """Two heads of three dims, by hand, with a scale on the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18, bias=False), nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.scale * self.out(mixed.transpose(1, 2).flatten(2))


def test_a_head_without_values_needs_no_query_and_no_key() -> None:
    model = Attention()
    zero(model.qkv.weight, [12, 13, 14])
    found = kept(model, 2, 5, 6)
    assert found["qkv.weight"] == 9 * 6
    assert found["out.weight"] == 6 * 3


def test_a_query_dim_that_is_zero_needs_no_key() -> None:
    model = Attention()
    zero(model.qkv.weight, [0, 5])
    assert kept(model, 2, 5, 6)["qkv.weight"] == (18 - 4) * 6


def test_multi_head_attention_is_seen_into() -> None:
    attention = nn.MultiheadAttention(6, 2, batch_first=True)
    zero(attention.in_proj_weight, [12, 13, 14])
    zero(attention.in_proj_bias, [12, 13, 14])

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attention(x, x, x, need_weights=False)[0]

    found = kept(Block(), 2, 5, 6)
    assert found["attention.in_proj_weight"] == 9 * 6
    assert found["attention.out_proj.weight"] == 6 * 3


def test_a_dead_scale_on_a_branch_frees_the_layer_before_it() -> None:
    model = Attention()
    zero(model.scale, [0, 1])
    found = kept(model, 2, 5, 6)
    assert (found["out.weight"], found["out.bias"]) == (4 * 6, 4)


def test_a_unit_shut_by_chance_is_not_dead_unless_the_data_is_what_counts() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        model[0].bias[:2] = -1e3
    torch.manual_seed(0)
    assert removable(model, [x(5, 4)]).removable == 0
    seen = removable(model, [x(5, 4)], observed=True).removable
    assert seen >= 2 * (4 + 1) + 2 * 3


def test_nor_is_one_whose_weight_is_computed() -> None:
    class Normalised(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight / self.weight.norm(), self.bias)

    model = nn.Sequential(Normalised(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        model[0].bias[:2] = -1e3
    torch.manual_seed(0)
    assert removable(model, [x(5, 4)]).removable == 0
    assert removable(model, [x(5, 4)], observed=True).removable > 0

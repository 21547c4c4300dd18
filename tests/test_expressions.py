"""Composite modules expressed in plain torch compute what they compute themselves."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import demp_fx
from demp_fx.tracing.module import TracedModule


class Holder(nn.Module):
    """A model with one layer, called with keyword arguments that are not example inputs."""

    def __init__(self, layer: nn.Module, **options: Any) -> None:
        super().__init__()
        self.layer, self.options = layer.double(), options

    def forward(self, **inputs: Tensor) -> Any:
        return self.layer(**inputs, **self.options)


def traced_like_eager(layer: nn.Module, inputs: dict[str, Tensor], **options: Any) -> TracedModule:
    """Trace; in eval and train mode outputs and input gradients equal eager's within 1e-12."""
    model = Holder(layer, **options).eval()
    graph = demp_fx.trace(model, inputs)
    assert not graph.meta["demp_fx"].opaque
    assert list(graph.state_dict()) == list(model.state_dict())
    for training in (False, True):
        model.train(training)
        graph.train(training)
        expected, actual = model(**inputs), graph(**inputs)
        assert type(expected) is type(actual)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    return graph


def tensor(*size: int) -> Tensor:
    return torch.randn(
        *size, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(size))
    )


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def causal_bias(length: int) -> Tensor:
    return torch.zeros(length, length, dtype=torch.float64).masked_fill(
        causal(length), float("-inf")
    )


PADDING = torch.tensor([[False] * 5, [False, False, False, True, True]])
BIASED = tensor(2 * 4, 5, 5)


def self_attention(x: Tensor, **more: Tensor) -> dict[str, Tensor]:
    return {"query": x, "key": x, "value": x, **more}


class SelfAttention(nn.Module):
    """One tensor is query, key and value: one product for all three."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 4, **options).double()

    def forward(self, x: Tensor) -> Any:
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("x", [tensor(2, 5, 8), tensor(5, 8)], ids=["batch", "unbatched"])
def test_self_attention_is_one_projection_and_one_kernel(
    bias: bool, batch_first: bool, x: Tensor
) -> None:
    model = SelfAttention(bias=bias, batch_first=batch_first)
    graph = demp_fx.trace(model, x)
    torch.testing.assert_close(graph(x), model(x), rtol=0, atol=1e-12)
    called = [node.target for node in graph.graph.nodes if node.op.startswith("call")]
    assert called.count(nn.functional.linear) == 1
    assert nn.functional.scaled_dot_product_attention in called
    assert "attention.out_proj" in called
    assert "attention.in_proj_weight" in [n.target for n in graph.graph.find_nodes(op="get_attr")]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 10}], ids=["packed", "separate"])
@pytest.mark.parametrize("bias", [True, False])
def test_cross_attention(need_weights: bool, batch_first: bool, sizes: Any, bias: bool) -> None:
    layer = nn.MultiheadAttention(8, 4, bias=bias, batch_first=batch_first, **sizes)
    inputs = {"query": tensor(2, 5, 8), "key": tensor(2, 7, 8), "value": tensor(2, 7, 8)}
    if sizes:
        inputs |= {"key": tensor(2, 7, 6), "value": tensor(2, 7, 10)}
    if not batch_first:
        inputs = {name: x.transpose(0, 1) for name, x in inputs.items()}
    traced_like_eager(layer, inputs, need_weights=need_weights)


def test_key_and_value_as_one_tensor() -> None:
    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 4, batch_first=True).double()

        def forward(self, x: Tensor, memory: Tensor) -> Any:
            return self.attention(x, memory, memory)

    model, inputs = Memory(), (tensor(2, 5, 8), tensor(2, 7, 8))
    graph = demp_fx.trace(model, inputs)
    torch.testing.assert_close(graph(*inputs), model(*inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "masks",
    [
        {"attn_mask": causal(5)},
        {"attn_mask": causal_bias(5)},
        {"attn_mask": BIASED},
        {"key_padding_mask": PADDING},
        {"key_padding_mask": PADDING, "attn_mask": causal(5)},
        {"key_padding_mask": PADDING.double(), "attn_mask": BIASED},
    ],
    ids=["bool", "float", "per head", "padding", "both bool", "both float"],
)
def test_masks_of_every_kind(need_weights: bool, masks: dict[str, Tensor]) -> None:
    layer = nn.MultiheadAttention(8, 4, batch_first=True)
    inputs = self_attention(tensor(2, 5, 8), **masks)
    traced_like_eager(layer, inputs, need_weights=need_weights)


def test_masks_of_unbatched_inputs() -> None:
    masks = {"attn_mask": BIASED[:4], "key_padding_mask": PADDING[1].double()}
    traced_like_eager(nn.MultiheadAttention(8, 4), self_attention(tensor(5, 8), **masks))


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_causal_hint_changes_nothing(need_weights: bool) -> None:
    layer = nn.MultiheadAttention(8, 4, batch_first=True)
    inputs = self_attention(tensor(2, 5, 8), attn_mask=causal(5))
    traced_like_eager(layer, inputs, need_weights=need_weights, is_causal=True)


def test_attention_weights_of_each_head() -> None:
    layer = nn.MultiheadAttention(8, 4, batch_first=True)
    traced_like_eager(layer, self_attention(tensor(2, 5, 8)), average_attn_weights=False)


def test_attention_dropout_follows_train_and_eval() -> None:
    graph = demp_fx.trace(SelfAttention(dropout=0.5).eval(), x := tensor(2, 5, 8))
    assert torch.equal(graph(x), graph(x))
    graph.train()
    assert not torch.equal(graph(x), graph(x))


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_extra_keys_are_nothing_that_is_followed(options: dict[str, bool]) -> None:
    """torch.export may, where it can."""
    model = Holder(nn.MultiheadAttention(8, 4, **options))
    inputs = self_attention(tensor(5, 2, 8))
    graph = demp_fx.trace(model, inputs)
    notes = graph.meta["demp_fx"]
    assert "add_zero_attn" in notes.exported or "add_zero_attn" in notes.opaque["layer"]
    torch.testing.assert_close(graph(**inputs), model(**inputs))


LAYER_OPTIONS = [
    {"norm_first": norm_first, "activation": activation, "batch_first": batch_first, "bias": bias}
    for norm_first, activation, batch_first, bias in [
        (False, "relu", True, True),
        (True, "gelu", True, True),
        (True, nn.SiLU(), False, True),
        (False, torch.tanh, False, False),
    ]
]


@pytest.mark.parametrize("options", LAYER_OPTIONS)
@pytest.mark.parametrize("masks", [{}, {"src_mask": causal(5), "src_key_padding_mask": PADDING}])
def test_transformer_encoder_layer(options: dict[str, Any], masks: dict[str, Tensor]) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, **options)
    src = tensor(2, 5, 8) if options["batch_first"] else tensor(5, 2, 8)
    traced_like_eager(layer, {"src": src, **masks})


@pytest.mark.parametrize("options", LAYER_OPTIONS)
@pytest.mark.parametrize("mask", [{}, {"tgt_mask": causal_bias(5), "tgt_is_causal": True}])
def test_transformer_decoder_layer(options: dict[str, Any], mask: dict[str, Any]) -> None:
    layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, **options)
    tgt, memory = tensor(2, 5, 8), tensor(2, 7, 8)
    if not options["batch_first"]:
        tgt, memory = tgt.transpose(0, 1), memory.transpose(0, 1)
    traced_like_eager(layer, {"tgt": tgt, "memory": memory, **mask})


def encoder(norm: nn.Module | None = None, **options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.TransformerEncoder(layer, 2, norm)


@pytest.mark.parametrize("masks", [{}, {"mask": causal(5)}, {"src_key_padding_mask": PADDING}])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder(masks: dict[str, Tensor], norm_first: bool) -> None:
    layers = encoder(nn.LayerNorm(8), norm_first=norm_first)
    graph = traced_like_eager(layers, {"src": tensor(2, 5, 8), **masks})
    leaves = {node.target for node in graph.graph.find_nodes(op="call_module")}
    assert {"layer.layers.0.linear1", "layer.layers.1.self_attn.out_proj", "layer.norm"} <= leaves


def test_transformer_decoder() -> None:
    layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    inputs = {"tgt": tensor(2, 5, 8), "memory": tensor(2, 7, 8), "tgt_mask": causal_bias(5)}
    traced_like_eager(nn.TransformerDecoder(layer, 2), inputs)


def test_transformer() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Transformer(8, 2, 2, 2, 16, dropout=0.0, norm_first=True, batch_first=True)
    inputs = {"src": tensor(2, 7, 8), "tgt": tensor(2, 5, 8), "tgt_mask": causal_bias(5)}
    traced_like_eager(model, inputs)


def test_a_subclass_with_its_own_block_keeps_it() -> None:
    class Doubled(nn.TransformerEncoderLayer):
        def _ff_block(self, x: Tensor) -> Tensor:
            return 2 * super()._ff_block(x)

    layer = Doubled(8, 2, 16, dropout=0.0, batch_first=True)
    traced_like_eager(layer, {"src": tensor(2, 5, 8)})


class Branch(nn.Module):
    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.drop = drop

    def forward(self, x: Tensor) -> Any:
        return self.drop(x)


@pytest.mark.parametrize("x", [torch.ones(400, 3), torch.ones(400, 2, 2, 2)])
def test_stochastic_depth_drops_rows_in_training_only(x: Tensor) -> None:
    drop = pytest.importorskip("tests.zoo.shim").torchvision.ops.StochasticDepth(0.25, "row")
    graph = demp_fx.trace(Branch(drop).eval(), x)
    assert torch.equal(graph(x), x)
    graph.train()
    torch.manual_seed(0)
    rows = graph(x).flatten(1)
    assert set(rows.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    assert 0.15 < (rows[:, 0] == 0).double().mean() < 0.35


def test_stochastic_depth_drops_a_whole_batch() -> None:
    drop = pytest.importorskip("tests.zoo.shim").torchvision.ops.StochasticDepth(0.5, "batch")
    x = torch.ones(8, 3)
    graph = demp_fx.trace(Branch(drop), x)
    torch.manual_seed(0)
    outputs = [graph(x) for _ in range(40)]
    assert {len(output.unique()) for output in outputs} == {1}
    assert {output[0, 0].item() for output in outputs} == {0.0, 2.0}


@pytest.mark.parametrize(("scale_by_keep", "alive"), [(True, 2.0), (False, 1.0)])
def test_drop_path_of_timm(scale_by_keep: bool, alive: float) -> None:
    drop = pytest.importorskip("timm.layers").DropPath(0.5, scale_by_keep)
    x = torch.ones(100, 3)
    graph = demp_fx.trace(Branch(drop), x)
    torch.manual_seed(0)
    assert set(graph(x).unique().tolist()) == {0.0, alive}
    assert torch.equal(graph.eval()(x), x)


def test_batch_norm_of_timm_follows_train_and_eval() -> None:
    norm = pytest.importorskip("timm.layers").BatchNormAct2d(4)
    x = torch.randn(3, 4, 5, 5)
    model = Branch(norm).eval()
    graph = demp_fx.trace(model, x)
    for training in (True, False):
        model.train(training)
        graph.train(training)
        torch.testing.assert_close(graph(x), model(x))
    assert graph.get_buffer("drop.num_batches_tracked") == 2


class NormThenAct(nn.BatchNorm2d):
    """A batch norm with parts of its own, as timm's are."""

    def __init__(self, width: int, **settings: Any) -> None:
        super().__init__(width, **settings)
        self.act = nn.SiLU()

    def forward(self, input: Tensor) -> Tensor:
        return self.act(super().forward(input)).flatten(1)


def test_a_layer_derived_of_batch_norm_calls_torchs_and_then_its_parts() -> None:
    graph = traced_like_eager(NormThenAct(4), {"input": tensor(3, 4, 2, 2)})
    calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    assert calls == ["layer", "layer.act"]
    assert type(graph.get_submodule("layer")) is nn.BatchNorm2d


@pytest.mark.parametrize(
    "settings", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}]
)
def test_a_derived_batch_norm_keeps_its_settings(settings: dict[str, Any]) -> None:
    traced_like_eager(NormThenAct(4, **settings), {"input": tensor(3, 4, 2, 2)})


def test_a_derived_batch_norm_that_takes_what_torchs_refuses_stays_in_parts() -> None:
    class Any4(nn.BatchNorm2d):
        def _check_input_dim(self, input: Tensor) -> None:
            pass

    graph = traced_like_eager(Any4(4), {"input": tensor(3, 4, 2)})
    assert not [node for node in graph.graph.nodes if node.op == "call_module"]


def test_hooks_of_a_derived_batch_norm_run_once() -> None:
    layer = NormThenAct(4)
    layer.register_forward_hook(lambda module, args, out: out + 1.0)
    traced_like_eager(layer, {"input": tensor(3, 4, 2, 2)})


def test_a_derived_batch_norm_is_called_again_after_its_part() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = NormThenAct(4)

        def forward(self, input: Tensor) -> Tensor:
            return self.norm(self.norm.act(input)) + self.norm(input)

    graph = traced_like_eager(Twice(), {"input": tensor(3, 4, 2, 2)})
    calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    assert calls[:2] == ["layer.norm.act", "layer.norm"]


class Pool(nn.Module):
    """Attention called as torch's function, with the weights of linear layers."""

    def __init__(self, separate: bool, **options: Any) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))
        self.in_proj, self.c_proj = nn.Linear(8, 24), nn.Linear(8, 5)
        self.separate, self.options = separate, options

    def forward(self, query: Tensor, **masks: Tensor) -> Any:
        parts = (self.q_proj, self.k_proj, self.v_proj)
        bias = torch.cat([part.bias for part in parts]) if self.separate else self.in_proj.bias
        return nn.functional.multi_head_attention_forward(
            query=query[:2], key=query, value=query, embed_dim_to_check=query.shape[-1],
            num_heads=2, in_proj_weight=None if self.separate else self.in_proj.weight,
            in_proj_bias=bias, bias_k=None, bias_v=None, add_zero_attn=False, dropout_p=0.0,
            out_proj_weight=self.c_proj.weight, out_proj_bias=self.c_proj.bias,
            training=self.training, use_separate_proj_weight=self.separate,
            q_proj_weight=self.q_proj.weight, k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight, **self.options, **masks,
        )  # fmt: skip


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("separate", [True, False])
def test_attention_called_as_a_function(separate: bool, need_weights: bool) -> None:
    layer = Pool(separate, need_weights=need_weights)
    traced_like_eager(layer, {"query": tensor(5, 2, 8)})
    traced_like_eager(layer, {"query": tensor(5, 2, 8), "key_padding_mask": PADDING})


def test_attention_called_as_a_function_is_narrowed() -> None:
    layer = Pool(separate=True, need_weights=False).double()
    with torch.no_grad():
        for part in (layer.q_proj, layer.k_proj, layer.v_proj):  # two of four dims of each head
            part.weight[::2] = 0
            part.bias[::2] = 0
    x = tensor(5, 2, 8)
    narrow = demp_fx.compile(layer, {"query": x}).module
    assert narrow.get_parameter("k_proj.weight").shape == (4, 8)
    assert narrow.get_parameter("c_proj.weight").shape == (5, 4)
    torch.testing.assert_close(narrow(query=x), layer(query=x), rtol=0, atol=1e-12)


def test_static_keys_are_left_to_torch() -> None:
    keys = tensor(4, 5, 4)
    layer = Pool(separate=True, need_weights=False, static_k=keys)
    traced_like_eager(layer, {"query": tensor(5, 2, 8)})

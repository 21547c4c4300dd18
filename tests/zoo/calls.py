"""Calls of torch functions that take a weight: which argument is what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# name -> where the weight stands among the arguments; the bias follows it
_LAYERS = {"linear": 1} | {f"conv{n}d": 1 for n in (1, 2, 3)}
_TRANSPOSED = {f"conv_transpose{n}d": 1 for n in (1, 2, 3)}
_NORMS = {"layer_norm": 2, "group_norm": 2, "batch_norm": 3}


@dataclass(frozen=True)
class Call:
    """One call: the input and output channels lie on `axis` of both tensors."""

    kind: str  # "linear", "conv", "transposed" or "norm"
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    axis: int
    groups: int = 1
    pads: bool = False

    @property
    def outputs(self) -> int:
        """How many output channels."""
        return self.weight.size(1) * self.groups if self.kind == "transposed" else len(self.weight)

    def boxes(self, weight: Tensor) -> Tensor:
        """The weight as (groups, outputs of a group, inputs of a group, kernel ...)."""
        split = weight.unflatten(0, (self.groups, -1))
        return split.transpose(1, 2) if self.kind == "transposed" else split


def call_of(func: Callable[..., Any], args: Any, kwargs: Any) -> Call | None:
    """What `func` called like this is, or None where it is no layer with a weight."""
    name = getattr(func, "__name__", "")

    def argument(place: int, key: str, default: Any = None) -> Any:
        return args[place] if place < len(args) else kwargs.get(key, default)

    x = argument(0, "input")
    if name in _NORMS:
        place = _NORMS[name]
        weight, bias = argument(place, "weight"), argument(place + 1, "bias")
        if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(x, Tensor):
            return None
        return Call("norm", x, weight, bias, -1 if name == "layer_norm" else 1)
    if name not in _LAYERS and name not in _TRANSPOSED:
        return None
    weight, bias = argument(1, "weight"), argument(2, "bias")
    if name == "linear":
        return Call("linear", x, weight, bias, -1)
    transposed = name in _TRANSPOSED
    axis = -(weight.dim() - 1)
    groups = argument(6, "groups", 1)
    padding = argument(4, "padding", 0)
    pads = padding != "valid" and any(padding if isinstance(padding, (tuple, list)) else [padding])
    if transposed:  # how many weights meet at a place depends on the place
        return Call("transposed", x, weight, bias, axis, groups, pads=True)
    return Call("conv", x, weight, bias, axis, groups, bool(pads))


def self_attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int,
    in_proj_weight: Any, in_proj_bias: Tensor | None, *more: Any, **named: Any,
) -> tuple[Tensor, None] | None:  # fmt: skip
    """`F.multi_head_attention_forward` in parts, on (length, batch, width), where it is plain
    self-attention without masks; else None."""
    masks = [named.get(key) for key in ("key_padding_mask", "attn_mask", "bias_k", "bias_v")]
    plain = query is key is value and not any(m is not None for m in masks)
    if not plain or named.get("need_weights", True) or more[:4] != (None, None, False, 0.0):
        return None
    out_proj_weight, out_proj_bias = more[4], more[5]

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (num_heads, -1)).movedim(0, -2)  # (batch, head, length, dim)

    if named.get("use_separate_proj_weight"):
        weights = [named[f"{name}_proj_weight"] for name in "qkv"]
        biases = [None] * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        parts = [F.linear(query, w, b) for w, b in zip(weights, biases, strict=True)]
    else:
        parts = list(F.linear(query, in_proj_weight, in_proj_bias).chunk(3, dim=-1))
    q, k, v = map(heads, parts)
    mixed = torch.softmax(q @ k.transpose(-2, -1) * q.size(-1) ** -0.5, dim=-1) @ v
    return F.linear(mixed.movedim(-2, 0).flatten(-2), out_proj_weight, out_proj_bias), None

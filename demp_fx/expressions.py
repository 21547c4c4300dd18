"""Composite modules in plain torch operations, so that tracing sees their parts.

`torch.nn`'s attention and transformer modules choose between fused kernels at run time; batch
normalisation and stochastic depth branch on `training`. Each has one function here: it takes the
module and the arguments of its forward and computes the same in both modes. (Where a batch norm's
own forward is called, tracing makes a node of that: see `Tracer.batch_norm`.) What
`nn.TransformerEncoder` does only without gradients (nested tensors, zeros at padded positions) is
left out: the result is the one it gives when a parameter requires a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Expression = Callable[..., Any]


def multihead_attention(
    m: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`nn.MultiheadAttention`, batched and unbatched alike: dims are counted from the end.

    Raises:
        NotImplementedError: `bias_k`, `bias_v` or `add_zero_attn` are in use.
    """
    if m.bias_k is not None or m.bias_v is not None or m.add_zero_attn:
        raise NotImplementedError("nn.MultiheadAttention with bias_k, bias_v or add_zero_attn")
    if is_causal and attn_mask is None:
        raise RuntimeError("nn.MultiheadAttention needs attn_mask where is_causal is set")
    hint = is_causal and key_padding_mask is None and not need_weights
    mask = None if hint else _attention_mask(m, query, attn_mask, key_padding_mask)
    q, k, v = (_split_heads(m, part) for part in _in_projection(m, query, key, value))
    # Spelled out, the scale stays what it is when heads become narrower.
    scale = m.head_dim**-0.5
    if need_weights:
        scores = torch.matmul(q * scale, k.transpose(-2, -1))
        weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
        weights = F.dropout(weights, m.dropout, m.training)
        heads = torch.matmul(weights, v)
    else:
        dropout = m.dropout * m.training if m.dropout else 0.0
        heads = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=hint, scale=scale
        )
    rows = heads.transpose(-3, -2) if m.batch_first else heads.movedim(-2, 0)
    output = m.out_proj(rows.flatten(-2))
    if not need_weights:
        return output, None
    return output, weights.mean(dim=-3) if average_attn_weights else weights


def attention_function(
    query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int,
    in_proj_weight: Tensor | None, in_proj_bias: Tensor | None, bias_k: Tensor | None,
    bias_v: Tensor | None, add_zero_attn: bool, dropout_p: float, out_proj_weight: Tensor,
    out_proj_bias: Tensor | None, training: bool = True, key_padding_mask: Tensor | None = None,
    need_weights: bool = True, attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False, q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None, v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None, static_v: Tensor | None = None,
    average_attn_weights: bool = True, is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`F.multi_head_attention_forward`, called with the weights of other layers.

    Raises:
        NotImplementedError: `bias_k`, `bias_v`, `add_zero_attn` or static keys are in use.
    """
    if static_k is not None or static_v is not None:
        raise NotImplementedError("attention with static keys or values")
    weight: Any = q_proj_weight if use_separate_proj_weight else in_proj_weight
    layer: Any = SimpleNamespace(
        num_heads=num_heads, head_dim=weight.shape[-1] // num_heads, batch_first=False,
        dropout=dropout_p, training=training, bias_k=bias_k, bias_v=bias_v,
        add_zero_attn=add_zero_attn, _qkv_same_embed_dim=not use_separate_proj_weight,
        in_proj_weight=in_proj_weight, in_proj_bias=in_proj_bias, q_proj_weight=q_proj_weight,
        k_proj_weight=k_proj_weight, v_proj_weight=v_proj_weight,
        out_proj=lambda rows: F.linear(rows, out_proj_weight, out_proj_bias),
    )  # fmt: skip
    return multihead_attention(
        layer, query, key, value, key_padding_mask, need_weights, attn_mask,
        average_attn_weights, is_causal,
    )  # fmt: skip


def _in_projection(
    m: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value after their projections; one product where all three are one tensor."""
    if m._qkv_same_embed_dim and query is key and key is value:
        q, k, v = F.linear(query, m.in_proj_weight, m.in_proj_bias).chunk(3, dim=-1)
        return q, k, v
    if m._qkv_same_embed_dim:
        w_q, w_k, w_v = m.in_proj_weight.chunk(3)
    else:
        w_q, w_k, w_v = m.q_proj_weight, m.k_proj_weight, m.v_proj_weight
    if m.in_proj_bias is None:
        return F.linear(query, w_q), F.linear(key, w_k), F.linear(value, w_v)
    b_q, b_k, b_v = m.in_proj_bias.chunk(3)
    return F.linear(query, w_q, b_q), F.linear(key, w_k, b_k), F.linear(value, w_v, b_v)


def _split_heads(m: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """[batch, length, embed] or [length, batch, embed] -> [batch, head, length, head_dim]."""
    heads: Tensor = torch.unflatten(x, -1, (m.num_heads, m.head_dim))
    return heads.transpose(-3, -2) if m.batch_first else heads.movedim(0, -2)


def _attention_mask(
    m: nn.MultiheadAttention, query: Tensor, attn_mask: Tensor | None, padding: Tensor | None
) -> Tensor | None:
    """Both masks as one to add to [batch, head, target, source] scores, or None."""
    mask = None
    if attn_mask is not None:
        mask = _additive(attn_mask, query)
        if attn_mask.dim() == 3 and query.dim() == 3:  # [batch * head, target, source]
            mask = torch.unflatten(mask, 0, (-1, m.num_heads))
    if padding is None:
        return mask
    columns = _additive(padding, query).unsqueeze(-2).unsqueeze(-2)
    return columns if mask is None else mask + columns


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as numbers to add: a boolean one forbids where it is True."""
    if mask.dtype == torch.bool:
        mask = torch.where(mask, float("-inf"), 0.0)
    return mask.to(like)


def transformer_encoder_layer(
    m: nn.TransformerEncoderLayer,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """`nn.TransformerEncoderLayer` without its fused kernel."""
    if m.norm_first:
        src = src + m._sa_block(m.norm1(src), src_mask, src_key_padding_mask, is_causal=is_causal)
        return src + m._ff_block(m.norm2(src))
    src = m.norm1(src + m._sa_block(src, src_mask, src_key_padding_mask, is_causal=is_causal))
    return m.norm2(src + m._ff_block(src))  # type: ignore[no-any-return]


def transformer_encoder(
    m: nn.TransformerEncoder,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    """`nn.TransformerEncoder`; a mask is added as it is, not searched for being causal."""
    padding, causal = src_key_padding_mask, bool(is_causal)
    for layer in m.layers:
        src = layer(src, src_mask=mask, src_key_padding_mask=padding, is_causal=causal)
    return src if m.norm is None else m.norm(src)


def transformer_decoder(
    m: nn.TransformerDecoder,
    tgt: Tensor,
    memory: Tensor,
    tgt_mask: Tensor | None = None,
    memory_mask: Tensor | None = None,
    tgt_key_padding_mask: Tensor | None = None,
    memory_key_padding_mask: Tensor | None = None,
    tgt_is_causal: bool | None = None,
    memory_is_causal: bool = False,
) -> Tensor:
    """`nn.TransformerDecoder`; a mask is added as it is, not searched for being causal."""
    for layer in m.layers:
        tgt = layer(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=bool(tgt_is_causal),
            memory_is_causal=memory_is_causal,
        )
    return tgt if m.norm is None else m.norm(tgt)


def batch_norm(m: Any, x: Tensor) -> Tensor:
    """`nn.BatchNorm*d` where it cannot be a node: it is the root, or its weight is computed.

    Raises:
        NotImplementedError: the running statistics are cumulative (`momentum=None`).
    """
    if m.running_mean is None:
        return F.batch_norm(x, None, None, m.weight, m.bias, True, 0.0, m.eps)
    if m.training is False:  # it stays in this mode: `Tracer.kept`
        return F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, False, 0.0, m.eps)
    if m.momentum is None:
        raise NotImplementedError("batch normalisation with momentum=None")
    m.num_batches_tracked.add_(m.training)
    return F.batch_norm(
        x, m.running_mean, m.running_var, m.weight, m.bias, m.training, m.momentum, m.eps
    )


def batch_norm_act(m: Any, x: Tensor) -> Tensor:
    """timm's normalisation, dropout and activation in one layer."""
    return m.act(m.drop(nn.BatchNorm2d.forward(m, x)))  # type: ignore[no-any-return]


def stochastic_depth(m: Any, input: Tensor) -> Tensor:
    """torchvision's residual branches dropped at random: `feature_dropout` draws one number a
    (row, channel), and the dims put in front make the batch, or a row of it, the one channel."""
    if m.mode == "batch":
        dropped = torch.feature_dropout(input.unsqueeze(0).unsqueeze(0), m.p, m.training)
        return dropped.squeeze(0).squeeze(0)
    return torch.feature_dropout(input.unsqueeze(1), m.p, m.training).squeeze(1)


def drop_path(m: Any, x: Tensor) -> Tensor:
    """timm's stochastic depth; without `scale_by_keep` the survivors are not scaled up."""
    if not m.drop_prob:
        return x
    if m.scale_by_keep:
        return torch.feature_dropout(x.unsqueeze(1), m.drop_prob, m.training).squeeze(1)
    ones = torch.ones_like(x).unsqueeze(1)
    kept = torch.feature_dropout(ones, m.drop_prob, m.training).squeeze(1)
    return x * kept.clamp(max=1.0)


# Modules of other packages go by qualified name, so that nothing is imported for them.
EXPRESSIONS: dict[type[nn.Module] | str, Expression] = {
    nn.MultiheadAttention: multihead_attention,
    nn.TransformerEncoderLayer: transformer_encoder_layer,
    nn.TransformerEncoder: transformer_encoder,
    nn.TransformerDecoder: transformer_decoder,
    "torchvision.ops.stochastic_depth.StochasticDepth": stochastic_depth,
    "timm.layers.drop.DropPath": drop_path,
    "timm.layers.norm_act.BatchNormAct2d": batch_norm_act,
}


def expression_of(module: nn.Module) -> Expression | None:
    """The function that stands for `module`'s forward, or None; an overridden forward has none."""
    for base in type(module).__mro__:
        if not issubclass(base, nn.Module):
            continue
        found = EXPRESSIONS.get(base) or EXPRESSIONS.get(f"{base.__module__}.{base.__qualname__}")
        if found is not None:
            return found if type(module).forward is base.forward else None
    return None

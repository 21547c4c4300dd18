"""Layers of torch with (batch, 8, 6, 6) going in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class _Tokens(nn.Module):
    """A layer of (batch, tokens, channels) on a feature map."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (6, 6))


class _Called(nn.Module):
    """A layer that is called in another way than with one tensor."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


class _Both(_Called):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x)


class _Self(_Called):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x)[0]


class _First(_Called):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class _Flat(_Called):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(0, 1))[0].unflatten(0, x.shape[:2])


class _Looked(_Called):
    """Rows of a table, picked by the numbers in a feature map, times the map."""

    def __init__(self, layer: nn.Module, flat: bool = False) -> None:
        super().__init__(layer)
        self.flat = flat

    def forward(self, x: Tensor) -> Tensor:
        words = x.mean(1).flatten(1).abs().mul(3).to(torch.int64).clamp(max=4)
        rows = self.layer(words) if self.flat else self.layer(words).mean(1)
        return x * rows[:, :, None, None]


# Layers on the channel path; those with weights are narrowed with what they read, or stay whole.
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "bilinear_layer": lambda: _Tokens(_Both(nn.Bilinear(8, 8, 8))),
    "attention": lambda: _Tokens(_Self(nn.MultiheadAttention(8, 2, batch_first=True))),
    "attention_bias": lambda: _Tokens(
        _Self(nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True))
    ),
    "encoder": lambda: _Tokens(nn.TransformerEncoderLayer(8, 2, 6, 0.0, batch_first=True)),
    "lstm": lambda: _Tokens(_First(nn.LSTM(8, 8, batch_first=True))),
    "gru": lambda: _Tokens(_First(nn.GRU(8, 8, batch_first=True, bidirectional=True))),
    "lstm_cell": lambda: _Tokens(_Flat(nn.LSTMCell(8, 8))),
    "embedding_rows": lambda: _Looked(nn.Embedding(5, 8)),
    "embedding_bag": lambda: _Looked(nn.EmbeddingBag(5, 8), flat=True),
    "weight_norm": lambda: torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)),
    "spectral_norm": lambda: torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 1)),
    "group_norm_scaled": lambda: nn.GroupNorm(4, 8),
    "layer_norm_scaled": lambda: nn.LayerNorm((8, 6, 6)),
    "local_norm": lambda: nn.LocalResponseNorm(3),
    "running_instance_norm": lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
    "prelu_layer": lambda: nn.PReLU(8),
    "prelu_one": lambda: nn.PReLU(),
    "rrelu": lambda: nn.RReLU(0.2, 0.2),
    "softmax2d": lambda: nn.Softmax2d(),
    "shuffle_layer": lambda: nn.ChannelShuffle(2),
    "unfold": lambda: nn.Sequential(nn.Unfold(3, padding=1), nn.Unflatten(2, (6, 6))),
    "conv3d": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv3d(1, 2, 3, padding=1), nn.Flatten(1, 2)
    ),
    "transposed": lambda: nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1),
    "transposed_depthwise": lambda: nn.ConvTranspose2d(8, 8, 2, groups=8),
    "grouped": lambda: nn.Conv2d(8, 4, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(8, 16, 3, padding=1, groups=8),
    "reflect": lambda: nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect"),
    "same": lambda: nn.Conv2d(8, 4, (3, 5), padding="same"),
    "linear_over_width": lambda: nn.Linear(6, 6),
    "pixels": lambda: nn.PixelShuffle(2),
    "fractional_pool": lambda: nn.AdaptiveMaxPool2d((3, 2)),
    "lp_pool_layer": lambda: nn.LPPool2d(2, 2),
    "frozen_norm": lambda: nn.BatchNorm2d(8, affine=False),
    "untracked_norm": lambda: nn.BatchNorm2d(8, track_running_stats=False),
}

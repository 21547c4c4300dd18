"""The networks whose pages are opened, with a part of their channels dead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.zoo.shim import torchvision  # transformers imports it, so it has to be importable


@dataclass(frozen=True)
class Shown:
    """A network, one of its layers by name and by node, and which norms lose channels."""

    build: Callable[[], nn.Module]
    example: Callable[[], Tensor | dict[str, Tensor]]
    layer: str
    dead: str = ""

    def model(self) -> nn.Module:
        """In eval mode, with channels killed (always the same ones)."""
        torch.manual_seed(0)
        model = self.build().eval()
        with torch.no_grad():
            for name, module in model.named_modules():
                if self.dead and name.endswith(self.dead) and isinstance(module, nn.BatchNorm2d):
                    gone = torch.rand(module.num_features) < 0.6 * torch.rand(())
                    module.weight[gone] = 0
                    module.bias[gone] = 0
        return model


def _images() -> Tensor:
    return torch.randn(1, 3, 224, 224)


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=4, n_embd=64, n_head=4, vocab_size=500, n_positions=64,
                        use_cache=False)  # fmt: skip
    return GPT2LMHeadModel(config)


NETWORKS = {
    "resnet50": Shown(torchvision.models.resnet50, _images, "layer2.0.conv1", "bn1"),
    "densenet121": Shown(
        torchvision.models.densenet121, _images, "features.denseblock1.denselayer3.conv1", "norm2"
    ),
    "swin_t": Shown(torchvision.models.swin_t, _images, "features.1.0.mlp.0"),
    "gpt2": Shown(_gpt2, lambda: {"input_ids": torch.arange(2 * 12).reshape(2, 12)},
                  "transformer.h.1.mlp.c_fc"),
    "swin_b": Shown(torchvision.models.swin_b, _images, "features.5.7.mlp.3"),
}  # fmt: skip

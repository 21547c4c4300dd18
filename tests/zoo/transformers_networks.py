"""The zoo: networks of transformers by name, at sizes that build in a moment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.zoo.shim import torchvision  # transformers imports it, so it has to be importable

import transformers as hf  # isort: skip

WORDS, WIDTH, LAYERS, HEADS, HIDDEN = 50, 16, 2, 4, 24
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_COMMON = {"vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
           "num_attention_heads": HEADS, "intermediate_size": HIDDEN}  # fmt: skip

assert torchvision


@dataclass(frozen=True)
class Transformer:
    """How to build a network, what it takes, and which layers make and read its hidden units.

    `makes`: names (their ends) of layers whose outputs are the hidden units of an MLP; `reads`: of
    the layers that read them. `halves`: a layer makes two values of each unit, one after the other.
    """

    build: Callable[[], nn.Module]
    makes: tuple[str, ...]
    reads: str
    inputs: tuple[str, ...] = ("input_ids",)
    halves: bool = False

    def example(self, batch: int = 2, length: int = 7) -> dict[str, Tensor]:
        """Arguments of its forward; a decoder gets two tokens fewer."""
        rng = torch.Generator().manual_seed(batch)
        given = {}
        for k, name in enumerate(self.inputs):
            if name == "pixel_values":
                given[name] = torch.randn(batch, 3, 16, 16, generator=rng, dtype=torch.float64)
            else:
                given[name] = torch.randint(3, WORDS, (batch, length - 2 * k), generator=rng)
        return given


TRANSFORMERS = {
    "bert": Transformer(
        lambda: hf.BertModel(hf.BertConfig(**_COMMON, max_position_embeddings=32)),
        ("intermediate.dense",), ".output.dense",
    ),
    "roberta": Transformer(
        lambda: hf.RobertaModel(hf.RobertaConfig(**_COMMON, **_TOKENS, max_position_embeddings=32)),
        ("intermediate.dense",), ".output.dense",
    ),
    "distilbert": Transformer(
        lambda: hf.DistilBertModel(
            hf.DistilBertConfig(vocab_size=WORDS, dim=WIDTH, n_layers=LAYERS, n_heads=HEADS,
                                hidden_dim=HIDDEN, max_position_embeddings=32)
        ),
        ("ffn.lin1",), "ffn.lin2",
    ),
    "gpt2": Transformer(
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=WORDS, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
                          n_inner=HIDDEN, n_positions=32, bos_token_id=1, eos_token_id=2)
        ),
        ("mlp.c_fc",), "mlp.c_proj",
    ),
    "t5": Transformer(
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=WORDS, d_model=WIDTH, d_kv=4, d_ff=HIDDEN, num_layers=LAYERS,
                        num_heads=HEADS, decoder_start_token_id=0)
        ),
        ("DenseReluDense.wi",), "DenseReluDense.wo", ("input_ids", "decoder_input_ids"),
    ),
    "vit": Transformer(
        lambda: hf.ViTModel(
            hf.ViTConfig(**{**_COMMON, "image_size": 16, "patch_size": 8, "vocab_size": None})
        ),
        ("mlp.fc1",), "mlp.fc2", ("pixel_values",),
    ),
    "llama": Transformer(
        lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(**_COMMON, **_TOKENS, num_key_value_heads=2, max_position_embeddings=32)
        ),
        ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj",
    ),
    "modernbert": Transformer(
        lambda: hf.ModernBertModel(
            hf.ModernBertConfig(**_COMMON, **_TOKENS, cls_token_id=1, sep_token_id=2,
                                local_attention=4, max_position_embeddings=32)
        ),
        ("mlp.Wi",), "mlp.Wo", halves=True,
    ),
}  # fmt: skip
"""Networks by name."""


def build(network: Transformer) -> nn.Module:
    """The network in float64 and eval mode, the same each time; its biases are not zero."""
    torch.manual_seed(0)
    model = network.build().double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += 0.1 * torch.randn_like(p) * (p.dim() == 1 or "norm" in name)
    return model


@torch.no_grad()
def kill_hidden(model: nn.Module, network: Transformer, dead: int) -> None:
    """Zero what makes the first `dead` hidden units of every MLP."""
    for name, layer in model.named_modules():
        if name.endswith(network.makes):
            weight = layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight
            parts = weight.chunk(2) if network.halves else [weight]
            for part in parts:
                part[:dead] = 0
            if getattr(layer, "bias", None) is not None:
                layer.bias[:dead] = 0

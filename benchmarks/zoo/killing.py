"""Half of the channels of any network made dead, without knowing the network.

Whatever a channel can die of in training is done to a random half of the channels of each layer:

1. *Norms* (batch, layer, group, RMS ...): scale zero, and shift zero. Groups of a GroupNorm count
   for nothing here: scale and shift belong to channels.
2. *Hidden units*: rows and biases of a linear or convolution layer whose output goes straight into
   an activation. Which ones those are is seen by running the network once.
3. *Attention*: half of each head's query, key and value dims (the same number in every head, other
   indices: that is what fits into one tensor), and one whole head in four. Queries and keys die
   together, dim by dim.

With `constant`, shifts and biases stay where there are any: the channel then holds a number that
need not be zero. Everything that lives is redrawn where all its numbers are alike (ones, zeros), so
that no two channels can be taken for each other and no zero at initialisation hides a mistake. The
layer that gives the network's output is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

from benchmarks.zoo.networks import Inputs, call

NORM = re.compile("norm|^GroupNorm|^Bn", re.IGNORECASE)  # classes of other packages, by name
ACTIVATIONS = {
    F.relu, F.relu6, F.gelu, F.silu, F.mish, F.hardswish, F.hardtanh, F.leaky_relu, F.elu,
    torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu_, torch.nn.functional.softplus,
}  # fmt: skip
QUERY, KEY, VALUE = (
    {"q", "q_proj", "to_q", "query", "q_lin", "wq", "q_fc"},
    {"k", "k_proj", "to_k", "key", "k_lin", "wk"},
    {"v", "v_proj", "to_v", "value", "v_lin", "wv"},
)
PACKED = {
    "qkv": "qkv",
    "to_qkv": "qkv",
    "in_proj": "qkv",
    "kv": "kv",
    "to_kv": "kv",
    "c_attn": "qkv",
}


@torch.no_grad()
def kill(
    model: nn.Module, inputs: Inputs, fraction: float = 0.5, seed: int = 0, constant: bool = False
) -> dict[str, Tensor]:
    """Do all of the above to `model`, in place; the dead output channels, by module."""
    rng = torch.Generator().manual_seed(seed)
    watch = _Watch(model)
    with watch:
        call(model.eval(), inputs)
    final = watch.final()
    for module in model.modules():
        _redraw(module, rng)
    deaths: dict[str, Tensor] = {}
    heads: dict[str, _Heads] = {}
    for name, module in model.named_modules():
        if name in final:
            continue
        if _is_norm(module):
            dead = _some(module.weight.numel(), fraction, rng)
            module.weight.view(-1)[dead] = 0.0
            _silence(getattr(module, "bias", None), dead, constant)
            deaths[name] = dead
        elif isinstance(module, nn.MultiheadAttention):
            attention = _Heads.draw(module.num_heads, module.embed_dim, fraction, rng)
            _kill_multihead(module, attention, constant)
        elif isinstance(module, (nn.Linear, _ConvNd)) and name in watch.activated:
            width = module.weight.shape[1 if isinstance(module, _ConvTransposeNd) else 0]
            dead = _some(width, fraction, rng)
            _kill_rows(module, dead, constant)
            deaths[name] = dead
        elif isinstance(module, (nn.Linear, _ConvNd)):
            rows = _attention_rows(model, name, module, heads, fraction, rng)
            if rows is not None:
                _kill_rows(module, rows, constant)
                deaths[name] = rows
    return deaths


def _some(width: int, fraction: float, rng: torch.Generator) -> Tensor:
    """Random indices, at least one of them left out."""
    return torch.randperm(width, generator=rng)[: min(round(width * fraction), width - 1)]


def _silence(bias: Tensor | None, dead: Tensor, constant: bool) -> None:
    if bias is not None and not constant:
        bias.view(-1)[dead] = 0.0


def _kill_rows(layer: nn.Linear | _ConvNd, dead: Tensor, constant: bool) -> None:
    if isinstance(layer, _ConvTransposeNd):
        layer.weight[:, dead] = 0.0
    else:
        layer.weight[dead] = 0.0
    _silence(layer.bias, dead, constant)


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if isinstance(module, (_BatchNorm, nn.LayerNorm, nn.GroupNorm)):
        return weight is not None
    named = NORM.search(type(module).__name__) is not None
    return named and isinstance(weight, nn.Parameter) and weight.dim() == 1


def _redraw(module: nn.Module, rng: torch.Generator) -> None:
    """Uneven numbers wherever initialisation has put one and the same."""
    if isinstance(module, _BatchNorm) and module.running_mean is not None:
        module.running_mean.normal_(0.0, 0.1, generator=rng)
        module.running_var.uniform_(0.5, 2.0, generator=rng)
    for parameter in module.parameters(recurse=False):
        first = parameter.view(-1)[:1] if parameter.is_contiguous() else parameter.reshape(-1)[:1]
        if parameter.numel() == 0 or bool((parameter != first).any()):
            continue
        if float(first) == 0:
            parameter.normal_(0.0, 0.2, generator=rng)
        else:  # ones of a norm; small ones of a LayerScale are made to matter
            parameter.uniform_(0.5, 1.5, generator=rng)


# -- attention ----------------------------------------------------------------------------------


@dataclass
class _Heads:
    """Dead dims of attention heads, as indices into [head * dim]."""

    query: Tensor
    value: Tensor

    @classmethod
    def draw(cls, heads: int, width: int, fraction: float, rng: torch.Generator) -> _Heads:
        return cls(_in_heads(heads, width, fraction, rng), _in_heads(heads, width, fraction, rng))


def _in_heads(heads: int, width: int, fraction: float, rng: torch.Generator) -> Tensor:
    dim = width // heads
    mask = torch.zeros(heads, dim, dtype=torch.bool)
    for head in range(heads):
        mask[head, _some(dim, fraction, rng)] = True
    mask[: heads // 4] = True
    return mask.view(-1).nonzero().view(-1)


def _kill_multihead(module: nn.MultiheadAttention, heads: _Heads, constant: bool) -> None:
    """`nn.MultiheadAttention` packs its rows, or has three matrices of its own."""
    width = module.embed_dim
    for part, dead in enumerate((heads.query, heads.query, heads.value)):
        if module.in_proj_weight is not None:
            module.in_proj_weight[part * width + dead] = 0.0
        else:
            (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)[part][dead] = 0.0
        if module.in_proj_bias is not None and not (constant and part == 2):
            module.in_proj_bias[part * width + dead] = 0.0


def _attention_rows(
    model: nn.Module,
    name: str,
    layer: nn.Linear | _ConvNd,
    drawn: dict[str, _Heads],
    fraction: float,
    rng: torch.Generator,
) -> Tensor | None:
    """Dead rows of a projection of an attention module, which is known by its `num_heads`."""
    parent_name, _, own = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    heads = next(
        (n for key in ("num_heads", "heads", "num_attention_heads", "n_heads", "n_head")
         if isinstance(n := getattr(parent, key, None), int)), None,
    )  # fmt: skip
    rows = layer.weight.shape[0]
    parts = len(PACKED.get(own, "x"))
    if heads is None or rows % (parts * heads) or rows // (parts * heads) < 2:
        return None
    width = rows // parts
    key = f"{parent_name}:{width}"
    if key not in drawn:
        drawn[key] = _Heads.draw(heads, width, fraction, rng)
    found = drawn[key]
    if own in PACKED:
        dead = [found.value if part == "v" else found.query for part in PACKED[own]]
        return torch.cat([i * width + d for i, d in enumerate(dead)])
    if own in QUERY | KEY:
        return found.query
    return found.value if own in VALUE else None


# -- which layers go into an activation -----------------------------------------------------------


class _Watch(TorchFunctionMode):
    """While open, remembers whose output each activation takes, and who runs last."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.activated: set[str] = set()
        self._made: dict[int, tuple[str, Tensor]] = {}  # by storage; tensors are held: no reuse
        self._last: list[str] = []
        self._layers = {
            m: n for n, m in model.named_modules() if isinstance(m, (nn.Linear, _ConvNd))
        }
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> _Watch:
        for layer in self._layers:
            self._handles.append(layer.register_forward_hook(self._ran))
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*error)
        self._made.clear()

    def _ran(self, layer: nn.Module, _: object, output: object) -> None:
        name = self._layers[layer]
        self._last.append(name)
        if isinstance(output, Tensor):
            self._made[output.untyped_storage().data_ptr()] = (name, output)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in ACTIVATIONS and isinstance(args[0], Tensor):
            found = self._made.get(args[0].untyped_storage().data_ptr())
            if found is not None:
                self.activated.add(found[0])
        return func(*args, **(kwargs or {}))

    def final(self) -> set[str]:
        """The layer that ran last."""
        return set(self._last[-1:])

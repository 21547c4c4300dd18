"""What a demon does to the parameters of living neurons after every step of the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from demp_fx.nodes.noise import Noise
from demp_fx.passes.instrument import HOME, STRENGTH
from demp_fx.passes.neurons import Neurons


class Pressure:
    """Noise and penalty of one instrumented module, at the widths that it has now."""

    def __init__(
        self, module: fx.GraphModule, layers: Sequence[Neurons], takes: Callable[[str], bool]
    ) -> None:
        self.module = module
        home = module.get_submodule(HOME)
        self.strength = home.get_buffer(STRENGTH)
        self.nodes = {
            name.removesuffix("_noise"): part
            for name, part in home.named_children()
            if isinstance(part, Noise)
        }
        self.parts: dict[str, list[tuple[str, int, Tensor]]] = {}
        for layer in layers:
            for part in layer.parts if layer.node in self.nodes else ():
                entry = layer.node, part.dim, part.channel
                self.parts.setdefault(part.parameter, []).append(entry)
        self.memory: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self.noisy = [
            (name, p)
            for name, p in module.named_parameters()
            if p.requires_grad and p.is_floating_point() and takes(name.rpartition(".")[0])
        ]

    def set_penalty(self, strength: float) -> None:
        """What every backward pass adds to a gradient, times the parameter's sign."""
        self.strength.fill_(strength)

    def live(self) -> dict[str, Tensor]:
        """Which channels of each layer of neurons had a gradient since the last `add_noise`."""
        found = {}
        for name, node in self.nodes.items():
            live = node.live()
            found[name] = torch.zeros_like(node.probe, dtype=torch.bool) if live is None else live
        return found

    def masks(self) -> dict[str, tuple[int, Tensor]]:
        """For each parameter of neurons the dim of its filters, and which of them live.

        A filter that belongs to no neuron lives; one that belongs to several, if one of them does.
        """
        live = self.live()
        masks = {}
        for name, entries in self.parts.items():
            dim = entries[0][1]
            mask = torch.zeros_like(entries[0][2], dtype=torch.bool)
            alone = torch.ones_like(mask)
            for node, _, channel in entries:
                mine = channel >= 0
                mask = mask.to(live[node].device)
                mask |= live[node][channel.clamp(min=0).to(mask.device)] & mine.to(mask.device)
                alone &= ~mine
            masks[name] = dim, mask | alone.to(mask.device)
        return masks

    @torch.no_grad()
    def add_noise(self, std: float, generator: torch.Generator) -> None:
        """Add std * N(0, 1) to every trained parameter of a living neuron, and to those of none."""
        masks = self.masks() if std > 0 else {}
        for name, p in self.noisy if std > 0 else ():
            noise = self._scratch(p).normal_(generator=generator)
            if name in masks:
                dim, mask = masks[name]
                shape = [1] * p.dim()
                shape[dim] = -1
                noise.mul_(mask.to(p.dtype).reshape(shape))
            p.add_(noise, alpha=std)
        for node in self.nodes.values():
            node.reset()

    def _scratch(self, p: Tensor) -> Tensor:
        """Memory of a parameter's shape, the same for all: new pages cost as much as the numbers
        that are put into them."""
        place = p.dtype, p.device
        have = self.memory.get(place)
        if have is None or have.numel() < p.numel():
            sizes = [q.numel() for _, q in self.noisy if (q.dtype, q.device) == place]
            have = self.memory[place] = torch.empty(max(sizes), dtype=p.dtype, device=p.device)
        return have[: p.numel()].view(p.shape)

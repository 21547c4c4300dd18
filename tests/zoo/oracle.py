"""How much of a network could go at most, found by running it: nothing of demp_fx is used here.

The network is run in float64 on several inputs (two resolutions, where it takes them), in eval and
train mode. Every call of a linear layer, convolution or norm on a parameter, made by whatever code,
is looked at from both sides:

1. *Known.* A channel of an input or output is known if it holds one and the same number at every
   position of every sample in every run of a mode, and so in both modes. The two numbers may
   differ: batch statistics turn a constant into the norm's shift, running statistics do not. (What
   the border of a padded constant leaves behind is no such number, and not counted.)
2. *Heard.* A channel of an output is heard if the gradient of a random projection of the network's
   outputs with respect to it is not exactly zero, in some run.

A channel is alive at an output if it is heard and not known; at an input if it is not known and
some alive output reads it. What a layer needs at most is the weights between its alive inputs and
outputs. A norm needs those of its alive outputs. In a grouped convolution the groups that live
need as many channels as the one of them that needs most: a weight is a box. Of a parameter that is
used in another way, an index along a dim is needed if its gradient is not exactly zero.

Chance must not pass for death: a ReLU may stay shut on every sample by accident. So, unless the
question is what goes on *this data* (`observed`), what is not known is made arbitrary: the output
of a layer is replaced by noise wherever it varies, its gradient passed straight through. Known
numbers and exact zeros are all that travels unchanged. On data only zeros count as known, which is
the paper's death test.

Constants that are not zero fold into a bias, unless the layer pads with zeros (at the border they
are missing) or they differ between the modes: then input channels have to stay to stand for all of
them (carriers), as many as the constants have independent directions over the modes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tests.zoo.calls import Call, call_of, self_attention
from tests.zoo.known import Known, channels_first

Arguments = Tensor | tuple[Any, ...] | Mapping[str, Any]


@dataclass
class Bound:
    """Parameters in all, and how many of each any exact narrower network must keep at least."""

    total: int
    kept: dict[str, int] = field(default_factory=dict)

    @property
    def removable(self) -> int:
        """At most so many parameters can go."""
        return self.total - sum(self.kept.values())


def removable(
    model: nn.Module,
    inputs: Sequence[Arguments],
    observed: bool = False,
    in_training: bool = True,
    own: bool = False,
) -> Bound:
    """The bound for a float64 model, over these inputs in eval mode, and in train mode too unless
    not `in_training`.

    With `observed` the inputs are the data that counts: what never fires on them is dead. With
    `own` the model is the oracle's to run and change (buffers, flags), and not copied.
    """
    model = model if own else copy.deepcopy(model)
    model.requires_grad_(True)
    names = {id(p): name for name, p in model.named_parameters()}
    watch = _Watch(names, substitute=not observed)
    others = _Others(model)
    torch.manual_seed(1)
    for train in (False, True) if in_training else (False,):
        for x in inputs:
            _run(model.train(train), x, watch, others)
    bound = Bound(total=sum(p.numel() for p in model.parameters()))
    for name, p in model.named_parameters():
        view = watch.views.get(name)
        needs = [] if view is None else [view.needed(observed)]
        if view is None or name in others.tables:  # a head that is tied to its embedding is both
            needs.append(others.needed(name, p))
        bound.kept[name] = max(needs)
        if view is not None and view.bias is not None:
            watch.biases.setdefault(view.bias, view)
    for name, view in watch.biases.items():
        bound.kept[name] = int(view.alive.sum())
    return bound


def _run(model: nn.Module, x: Arguments, watch: _Watch, others: _Others) -> None:
    """Once forward and backward, watched. Weights of layers need no gradients of their own."""
    x = pytree.tree_map_only(Tensor, _with_gradient, x)
    with watch:
        watch.training = model.training
        if isinstance(x, Mapping):
            result = model(**x)
        else:
            result = model(*x) if isinstance(x, tuple) else model(x)
    leaves = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
    if leaves:
        torch.autograd.backward([(t * torch.randn_like(t)).sum() for t in leaves])
    for name in watch.views.keys() - others.tables:
        model.get_parameter(name).requires_grad_(False)
    others.collect()


def _with_gradient(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_() if x.is_floating_point() else x


class _View:
    """What all runs together say about one weight's channels."""

    def __init__(self, call: Call, bias: str | None) -> None:
        self.call, self.bias = call, bias
        self.inputs, self.outputs = Known(), Known()
        self.heard = torch.zeros(call.outputs, dtype=torch.bool)

    def hear(self, gradient: Tensor) -> None:
        self.heard |= (channels_first(gradient, self.call.axis) != 0).any(dim=1)

    @property
    def alive(self) -> Tensor:
        return self.heard & ~self.outputs.known

    def needed(self, observed: bool) -> int:
        """Entries of the weight between alive inputs and alive outputs."""
        weight, alive = self.call.weight.detach(), self.alive
        if self.call.kind == "norm":
            return int(alive.sum())
        groups = self.call.groups
        silent = (self.inputs.zero if observed else self.inputs.known).view(groups, -1)
        outputs = inputs = living = 0
        # (groups, outputs of one, inputs of one, kernel): whichever way round it is stored
        boxes = self.call.boxes(weight)
        for group, box in enumerate(boxes):
            rows = alive.view(groups, -1)[group]
            if not bool(rows.any()):
                continue
            read = (box[rows] != 0).reshape(*box[rows].shape[:2], -1).any(dim=2).any(
                dim=0
            ) & ~silent[group]
            width = box.size(1)
            own = slice(group * width, (group + 1) * width)
            carriers = 0 if observed else self.inputs.carriers(self.call.pads, own)
            living += 1
            outputs = max(outputs, int(rows.sum()))
            inputs = max(inputs, min(int(read.sum()) + carriers, width))
        return living * outputs * inputs * boxes[0, 0, 0].numel()


class _Watch(TorchFunctionMode):
    """While open, every call on a parameter shows its view what goes in, comes out and is heard."""

    def __init__(self, names: dict[int, str], substitute: bool) -> None:
        super().__init__()
        self.names, self.substitute, self.training = names, substitute, False
        self.views: dict[str, _View] = {}
        self.biases: dict[str, _View] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.multi_head_attention_forward:
            with self:
                found = self_attention(*args, **kwargs)
            return func(*args, **kwargs) if found is None else found
        call = call_of(func, args, kwargs)
        result = func(*args, **kwargs)
        if call is None:
            return result
        if id(call.weight) not in self.names:  # a weight that is computed: known, or anything
            return self._arbitrary(call, result)
        name = self.names[id(call.weight)]
        view = self.views.get(name)
        if view is None:
            bias = self.names.get(id(call.bias)) if call.bias is not None else None
            view = self.views[name] = _View(call, bias)
        return self._seen(view, call, result)

    def _seen(self, view: _View, call: Call, result: Tensor) -> Tensor:
        view.inputs.see(channels_first(call.input.detach(), call.axis), self.training)
        varies = view.outputs.see(channels_first(result.detach(), call.axis), self.training)
        if result.requires_grad:
            result.register_hook(view.hear)
        if not self.substitute:
            return result.clone()  # an in-place activation after it must not touch what was heard
        return _replaced(result, call.axis, varies)

    def _arbitrary(self, call: Call, result: Tensor) -> Tensor:
        if not self.substitute or call.kind == "norm":
            return result
        varies = Known().see(channels_first(result.detach(), call.axis), self.training)
        return _replaced(result, call.axis, varies)


def _replaced(result: Tensor, axis: int, varies: Tensor) -> Tensor:
    """Noise in the channels that vary, their gradients passed straight through."""
    shape = [1] * result.dim()
    shape[axis] = -1
    noise = torch.randn_like(result)
    return result + torch.where(varies.view(shape), noise - result, 0.0).detach()


class _Others:
    """Parameters that no layer takes as its weight: which entries ever have a gradient."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = dict(model.named_parameters())
        self.kernels = {
            f"{name}.weight" for name, m in model.named_modules()
            if isinstance(m, nn.modules.conv._ConvNd)
        }  # fmt: skip
        self.tables = {
            f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Embedding)
        }
        self.felt: dict[str, Tensor] = {}

    def collect(self) -> None:
        """Take the gradients, and leave none."""
        for name, p in self.parameters.items():
            if p.grad is not None:
                felt = p.grad != 0
                self.felt[name] = self.felt[name] | felt if name in self.felt else felt
                p.grad = None

    def needed(self, name: str, parameter: nn.Parameter) -> int:
        """The smallest box that holds all that was felt. Positions of a kernel and rows of a
        table stay: which of them data touches is chance."""
        felt = self.felt.get(name)
        if felt is None:
            return 0
        fixed = set(range(2, felt.dim())) if name in self.kernels else set()
        fixed |= {0} if name in self.tables else set()
        count = 1
        for d in range(felt.dim()):
            rest = [i for i in range(felt.dim()) if i != d]
            along = felt.any(dim=rest) if rest else felt
            count *= felt.size(d) if d in fixed and bool(felt.any()) else int(along.sum())
        return count

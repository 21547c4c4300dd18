"""Noise and penalty equal a reference written from the paper in plain torch, step by step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import demp_fx
from demp_fx.recipe import Recipe
from tests.training.nets import Plain, Residual, batch, kill, probes

OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4),
    "adamw": lambda p: AdamW(p, lr=2e-3, weight_decay=5e-4),
}
STEPS, SPAN, PENALTY, STD = 12, 10, 0.03, 1e-2
NEVER = 10_000

# The neurons of the residual network by where they are seen, and what they are made of.
RESIDUAL = {
    "norm": ["stem", "norm"],
    "block1.bn1": ["block1.conv1", "block1.bn1"],
    "block1.sum": ["block1.conv2", "block1.bn2"],
    "block2.bn1": ["block2.conv1", "block2.bn1"],
    "block2.sum": ["block2.conv2", "block2.bn2", "block2.skip"],
    "hidden": ["hidden"],
}
SHIFTS = {"norm": "norm.bias", "block1.bn1": "block1.bn1.bias", "block1.sum": "block1.bn2.bias",
          "block2.bn1": "block2.bn1.bias", "block2.sum": "block2.bn2.bias",
          "hidden": "hidden.bias"}  # fmt: skip


def one_cycle(peak: float, step: int) -> float:
    rise = 3 * SPAN // 10
    if step >= SPAN:
        return peak / 25e4
    low, phase = (peak / 25, step / rise) if step < rise else (
        peak / 25e4, 1 - (step - rise) / (SPAN - rise)
    )  # fmt: skip
    return low + (peak - low) * (1 - math.cos(math.pi * phase)) / 2


class Reference:
    """The paper's update in plain torch: an L1 term in the loss, noise after the step."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, seed: int) -> None:
        self.model, self.optimizer = model, optimizer
        self.generator = torch.Generator().manual_seed(seed)

    def step(self, number: int) -> None:
        x, y = batch(number)
        parameters = dict(self.model.named_parameters())
        task = F.cross_entropy(self.model(x), y)
        grads = torch.autograd.grad(task, [parameters[s] for s in SHIFTS.values()])
        live = {neuron: g != 0 for neuron, g in zip(SHIFTS, grads, strict=True)}

        scales = [m.weight for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)]
        # the hidden layer has no scale: its weights stand in
        penalty = sum(s.abs().sum() for s in [*scales, parameters["hidden.weight"]])
        loss = F.cross_entropy(self.model(x), y) + one_cycle(PENALTY, number) * penalty
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

        owner = {layer: neuron for neuron, layers in RESIDUAL.items() for layer in layers}
        with torch.no_grad():
            for name, p in parameters.items():
                noise = torch.randn(p.shape, generator=self.generator, dtype=p.dtype)
                neuron = owner.get(name.rpartition(".")[0])
                if neuron is not None:
                    noise[~live[neuron]] = 0
                p += one_cycle(STD, number) * noise


def no_statistics(model: nn.Module) -> nn.Module:
    """The reference runs its forward twice a step: keep that out of the running statistics."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    return model


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_every_step_equals_the_reference(name: str) -> None:
    model = no_statistics(Residual())
    kill(model.norm, [0, 3])
    kill(model.block2.bn1, [1, 2, 11])
    with torch.no_grad():  # a block's output is dead where the sum is
        model.hidden.weight[4], model.hidden.bias[4] = 0, -9
    twin = copy.deepcopy(model)
    reference = Reference(twin, OPTIMIZERS[name](twin.parameters()), seed=7)
    optimizer = OPTIMIZERS[name](model.parameters())
    recipe = Recipe(penalty=PENALTY, noise_std=STD, span=SPAN, seed=7, prune_every=NEVER,
                    prune_at_start=False)  # fmt: skip
    demon = demp_fx.Demon(model, optimizer, batch(0)[0], recipe, probes())

    start = {key: p.detach().clone() for key, p in twin.named_parameters()}
    for number in range(STEPS):
        x, y = batch(number)
        optimizer.zero_grad()
        F.cross_entropy(demon.module(x), y).backward()
        optimizer.step()
        demon.step()
        reference.step(number)
        for key, p in twin.named_parameters():
            assert torch.allclose(demon.module.get_parameter(key), p, rtol=1e-9, atol=1e-12), key
    # and the dead were let alone, but for penalty and decay
    decay = max(group["lr"] * group["weight_decay"] for group in optimizer.param_groups) * STEPS
    dead = demon.module.get_parameter("stem.weight")[[0, 3]]
    assert torch.allclose(dead, start["stem.weight"][[0, 3]], atol=2 * decay)


def test_noise_spares_exactly_the_neurons_without_a_gradient() -> None:
    model = Plain()
    kill(model.bn1, [2, 5])
    optimizer = SGD(model.parameters(), lr=0.0)
    recipe = Recipe(penalty=0.1, noise_std=1e-3, span=10, prune_every=NEVER, prune_at_start=False)
    demon = demp_fx.Demon(model, optimizer, batch(0)[0], recipe, probes())
    before = {key: p.detach().clone() for key, p in demon.module.named_parameters()}
    F.cross_entropy(demon.module(batch(0)[0]), batch(0)[1]).backward()
    optimizer.step()
    demon.step()
    moved = {key: p.detach() != before[key] for key, p in demon.module.named_parameters()}
    for key in ("conv1.weight", "bn1.weight", "bn1.bias"):
        assert not moved[key][[2, 5]].any(), key
        assert moved[key][[0, 1, 3, 4, 6, 7]].all(), key
    assert moved["head.weight"].all()


def gradients(demon: demp_fx.Demon) -> dict[str, Tensor]:
    return {k: p.grad.clone() for k, p in demon.module.named_parameters() if p.grad is not None}


def make(model: nn.Module | None = None, **options: object) -> demp_fx.Demon:
    model = model or Plain()
    kill(model.get_submodule("bn1"), [2])  # type: ignore[arg-type]
    settings = {"penalty": 0.1, "noise_std": 1e-3, "span": 10, "prune_at_start": False, **options}
    optimizer = SGD(model.parameters(), lr=0.01)
    dtype = next(model.parameters()).dtype
    return demp_fx.Demon(model, optimizer, batch(0)[0].to(dtype), Recipe(**settings),
                         [p.to(dtype) for p in probes()])  # fmt: skip


def test_gradient_accumulation_counts_penalty_and_noise_once() -> None:
    whole, parts = make(), make(accumulate=2)
    for demon in (whole, parts):
        demon.module.eval()
        for m in demon.module.modules():  # statistics of a batch and of its halves differ
            m.training = not isinstance(m, nn.BatchNorm2d)
    x, y = batch(0)
    F.cross_entropy(whole.module(x), y).backward()
    for half in (slice(0, 4), slice(4, 8)):
        (F.cross_entropy(parts.module(x[half]), y[half]) / 2).backward()
    expected, found = gradients(whole), gradients(parts)
    for key, grad in expected.items():
        assert torch.allclose(found[key], grad, atol=1e-12), key
    before = parts.module.get_parameter("conv1.weight").detach().clone()
    live = parts.pressure.live()["act"]
    assert live.tolist() == [k != 2 for k in range(8)]
    parts.step()
    shift = parts.module.get_parameter("conv1.weight").detach() - before
    expected_std = 1e-3 / 25
    assert float(shift[live].std()) == pytest.approx(expected_std, rel=0.3)
    assert not parts.pressure.live()["act"].any()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_module_has_the_same_gradients(backend: str) -> None:
    demon = make()
    x, y = batch(0)
    F.cross_entropy(demon.module(x), y).backward()
    expected, live = gradients(demon), demon.pressure.live()
    demon.module.zero_grad()
    for node in demon.pressure.nodes.values():
        node.reset()
    compiled = torch.compile(demon.module, fullgraph=True, backend=backend)
    F.cross_entropy(compiled(x), y).backward()
    for key, grad in gradients(demon).items():
        assert torch.allclose(expected[key], grad, atol=1e-12), key
    for key, found in demon.pressure.live().items():
        assert torch.equal(found, live[key])


def test_autocast_leaves_penalty_and_noise_alone() -> None:
    demon = make(Plain().float())
    x, y = batch(0)
    gamma = demon.module.get_parameter("bn1.weight")
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(demon.module(x.float()), y)
    loss.backward()
    # a dead channel feels nothing but the penalty
    assert float(gamma.grad[2]) == pytest.approx(0.1 / 25, rel=1e-6)
    assert demon.pressure.live()["act"].tolist() == [k != 2 for k in range(8)]


def test_the_gradient_scaler_scales_the_penalty_too() -> None:
    model = Plain()
    kill(model.bn1, [2])
    optimizer = SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    recipe = Recipe(penalty=0.1, noise_std=0, span=10, prune_at_start=False)
    demon = demp_fx.Demon(model, optimizer, batch(0)[0], recipe, probes(), scaler=scaler)
    before = float(model.bn1.weight.detach()[2])
    scaler.scale(F.cross_entropy(demon.module(batch(0)[0]), batch(0)[1])).backward()
    scaler.step(optimizer)
    assert float(model.bn1.weight.detach()[2]) == pytest.approx(before - 0.1 * 0.1 / 25, rel=1e-9)


def test_in_eval_mode_nothing_is_added() -> None:
    demon = make()
    graph = demp_fx.trace(Plain(), batch(0)[0])
    graph.load_state_dict(demon.module.state_dict())
    x = batch(1)[0].requires_grad_()
    out = demon.module.eval()(x)
    assert torch.equal(out, graph.eval()(x))
    out.sum().backward()
    assert demon.pressure.live()["act"].any().item() is False
    plain = torch.autograd.grad(graph(x).sum(), graph.get_parameter("bn1.weight"))[0]
    assert torch.equal(demon.module.get_parameter("bn1.weight").grad, plain)

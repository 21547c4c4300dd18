"""A network narrowed in mid-training, its optimizer with it, follows the dense one step for step.

Each test trains two copies of one run, bit for bit the same, in float64. One is compiled half-way
with `optimizer=`; from then on both take the same batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

import demp_fx
from tests.zoo.kill import relative_error

STEPS = 5
SAME = 1e-8

OPTIMIZERS: dict[str, Callable[[list[dict]], Optimizer]] = {
    "sgd": lambda groups: SGD(groups, lr=0.05, momentum=0.9, nesterov=True),
    "adamw": lambda groups: AdamW(groups, lr=2e-3),
    "adam-amsgrad": lambda groups: Adam(groups, lr=2e-3, amsgrad=True),
    "rmsprop": lambda groups: RMSprop(groups, lr=1e-3, momentum=0.9, centered=True),
}


class Residual(nn.Module):
    """Two convolutions around which the input goes, by a projection where the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.project = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.project is None else self.project(x)))


class Net(nn.Module):
    """A stem, three residual blocks and a head with a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Residual(8, 8), Residual(8, 12), Residual(12, 12))
        self.hidden = nn.Linear(12 * 4, 16, bias=False)
        self.hidden_norm = nn.BatchNorm1d(16)
        self.classify = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.max_pool2d(F.relu(self.norm(self.stem(x))), 2))
        x = F.adaptive_avg_pool2d(x, 2).flatten(1)
        return self.classify(F.relu(self.hidden_norm(self.hidden(x))))


DEAD = {
    "norm": [1, 6],
    "blocks.0.bn1": [0, 2, 3, 7],
    "blocks.1.bn1": [1, 4, 5, 6, 8, 11],
    "blocks.2.bn1": [0, 1, 2, 9],
    "hidden_norm": [3, 4, 5, 10, 11, 12, 13, 15],
}
"""Dead for good: scale and shift 0 in front of a ReLU, whose gradient there is 0."""

NARROW_SHAPES = {
    "stem.weight": (6, 3, 3, 3),
    "blocks.0.conv1.weight": (4, 6, 3, 3),
    "blocks.1.conv2.weight": (12, 6, 3, 3),
    "blocks.2.bn1.bias": (8,),
    "hidden.weight": (8, 48),
    "classify.weight": (5, 8),
}


@dataclass
class Run:
    """A model in training. Matrices decay and the rest does not, as two parameter groups."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    taken: int = 0

    def train(self, steps: int) -> list[Tensor]:
        """The losses of so many steps, on batches that depend on nothing but the step's number."""
        losses = []
        for _ in range(steps):
            rng = torch.Generator().manual_seed(100 + self.taken)
            x = torch.randn(8, 3, 12, 12, generator=rng, dtype=torch.float64)
            target = torch.randint(5, (8,), generator=rng)
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(x), target)
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.taken += 1
            losses.append(loss.detach())
        return losses


def _one_cycle(optimizer: Optimizer) -> LRScheduler:
    return OneCycleLR(optimizer, max_lr=0.05, total_steps=4 * STEPS)


def _cosine(optimizer: Optimizer) -> LRScheduler:
    return CosineAnnealingLR(optimizer, T_max=4 * STEPS)


def _start(
    make: Callable[[list[dict]], Optimizer],
    schedule: Callable[[Optimizer], LRScheduler] = _cosine,
    frozen: tuple[str, ...] = (),
) -> Run:
    torch.manual_seed(0)
    model = Net().double()
    with torch.no_grad():
        for name, channels in DEAD.items():
            norm = model.get_submodule(name)
            norm.weight[channels] = 0.0
            norm.bias[channels] = 0.0
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = make(
        [{"params": matrices, "weight_decay": 1e-3}, {"params": vectors, "weight_decay": 0.0}]
    )
    return Run(model, optimizer, schedule(optimizer))


def _compile(run: Run) -> demp_fx.CompileResult:
    """Narrow the run in place: the same optimizer and scheduler objects go on with the result."""
    example = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    result = demp_fx.compile(run.model, example, optimizer=run.optimizer)
    run.model = result.module
    return result


def _groups_by_name(run: Run) -> list[list[str]]:
    names = {id(p): name for name, p in run.model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in run.optimizer.param_groups]


def _surviving_part(dense: Tensor, keep: dict[int, list[int]]) -> Tensor:
    for dim, index in keep.items():
        dense = dense.index_select(dim, torch.tensor(index))
    return dense


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_narrow_network_follows_the_dense_one(name: str) -> None:
    dense, narrow = _start(OPTIMIZERS[name]), _start(OPTIMIZERS[name])
    dense.train(STEPS)
    narrow.train(STEPS)

    plan = _compile(narrow).plan

    for expected, found in zip(dense.train(STEPS), narrow.train(STEPS), strict=True):
        assert relative_error(found, expected) <= SAME
    everything = dense.model.state_dict()
    for key, found in narrow.model.state_dict().items():
        expected = _surviving_part(everything[key], plan.keep.get(key, {}))
        assert relative_error(found, expected) <= SAME, key
    for key, shape in NARROW_SHAPES.items():
        assert narrow.model.get_parameter(key).shape == shape


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_every_state_tensor_is_the_surviving_part_of_the_dense_one(name: str) -> None:
    dense, narrow = _start(OPTIMIZERS[name]), _start(OPTIMIZERS[name])
    dense.train(STEPS)
    narrow.train(STEPS)

    plan = _compile(narrow).plan

    for key, p in narrow.model.named_parameters():
        state = narrow.optimizer.state[p]
        before = dense.optimizer.state[dense.model.get_parameter(key)]
        assert list(state) == list(before)
        for slot, value in before.items():
            cut = plan.keep.get(key, {}) if value.dim() else {}  # a step count is no such tensor
            assert torch.equal(state[slot], _surviving_part(value, cut)), (key, slot)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_parameter_groups_stay_as_they_were(name: str) -> None:
    run = _start(OPTIMIZERS[name])
    run.train(STEPS)
    optimizer, names = run.optimizer, _groups_by_name(run)
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]

    _compile(run)

    assert _groups_by_name(run) == names
    assert options == [
        {k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups
    ]
    assert set(optimizer.state) <= set(run.model.parameters())


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_every_narrow_parameter_is_trained(name: str) -> None:
    run = _start(OPTIMIZERS[name])
    run.train(STEPS)
    _compile(run)
    before = {key: p.detach().clone() for key, p in run.model.named_parameters()}

    run.train(1)

    unmoved = [k for k, p in run.model.named_parameters() if torch.equal(p.detach(), before[k])]
    assert unmoved == []


@pytest.mark.parametrize("schedule", [_cosine, _one_cycle], ids=["cosine", "one-cycle"])
def test_a_scheduler_on_the_same_optimizer_goes_on(
    schedule: Callable[[Optimizer], LRScheduler],
) -> None:
    dense, narrow = (_start(OPTIMIZERS["sgd"], schedule) for _ in range(2))
    dense.train(STEPS)
    narrow.train(STEPS)
    _compile(narrow)

    for _ in range(STEPS):
        dense.train(1)
        narrow.train(1)
        for ours, theirs in zip(
            narrow.optimizer.param_groups, dense.optimizer.param_groups, strict=True
        ):
            assert ours["lr"] == theirs["lr"]
            assert ours["momentum"] == theirs["momentum"]
    assert narrow.scheduler.optimizer is narrow.optimizer


def test_frozen_parameters_stay_frozen() -> None:
    frozen = ("stem.weight", "blocks.1.conv2.weight")
    run = _start(OPTIMIZERS["adamw"], frozen=frozen)
    run.train(STEPS)
    _compile(run)
    before = {name: run.model.get_parameter(name).detach().clone() for name in frozen}

    run.train(STEPS)

    still = {name for name, p in run.model.named_parameters() if not p.requires_grad}
    assert still == set(frozen)
    for name in frozen:
        assert torch.equal(run.model.get_parameter(name), before[name])


def test_the_dense_model_is_left_alone() -> None:
    run = _start(OPTIMIZERS["sgd"])
    run.train(STEPS)
    dense, before = run.model, {k: v.clone() for k, v in run.model.state_dict().items()}

    _compile(run)
    run.train(STEPS)

    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())


def test_an_optimizer_that_has_not_stepped_yet_is_taken_over_too() -> None:
    dense, narrow = _start(OPTIMIZERS["adamw"]), _start(OPTIMIZERS["adamw"])
    _compile(narrow)
    for expected, found in zip(dense.train(STEPS), narrow.train(STEPS), strict=True):
        assert relative_error(found, expected) <= SAME

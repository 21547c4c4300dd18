"""What the demon costs: an instrumented step against a plain one, and a death check with narrowing.

    python -m benchmarks.train_overhead [--out benchmarks/results/train_overhead.json]

The step: ResNet-18 with a CIFAR stem, SGD, batch 128 of 32 x 32, in turns with the plain network.
The check: torchvision's ResNet-50 with AdamW, three in ten channels dead, in units of its own
training step (batch 32 of 64 x 64); three probe batches of 64 images, in eval and train mode.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import demp_fx
from benchmarks.measure import Contender, median, ratio, side_by_side, surroundings
from demp_fx.recipe import Recipe
from examples.resnet import resnet18
from tests.zoo.shim import torchvision

ROUNDS, BATCH = 5, 128


def overhead() -> dict[str, float]:
    """Seconds of a plain and of an instrumented step, and the median of their ratios."""
    x, y = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))

    def plain() -> Contender:
        model = resnet18()
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

        def step(_: object) -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

        return Contender(step)

    def instrumented() -> Contender:
        model = resnet18()
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        recipe = Recipe(prune_every=10**6, prune_at_start=False)
        demon = demp_fx.Demon(model, optimizer, x[:2], recipe, [x])

        def step(_: object) -> None:
            optimizer.zero_grad()
            F.cross_entropy(demon.module(x), y).backward()
            optimizer.step()
            demon.step()

        return Contender(step)

    seconds = side_by_side({"plain": plain(), "instrumented": instrumented()}, ROUNDS)
    return {
        "plain_seconds": median(seconds["plain"]),
        "instrumented_seconds": median(seconds["instrumented"]),
        "ratio": ratio(seconds["instrumented"], seconds["plain"]),
    }


def check() -> dict[str, object]:
    """Seconds of a training step of ResNet-50, and of a check that narrows it."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50(num_classes=10)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                dead = torch.rand(module.num_features, generator=rng) < 0.3
                module.weight[dead], module.bias[dead] = 0.05, -5.0
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    x, y = torch.randn(32, 3, 64, 64), torch.randint(10, (32,))
    probes = [torch.randn(64, 3, 64, 64) for _ in range(3)]
    demon = demp_fx.Demon(model, optimizer, x[:2], Recipe(prune_at_start=False), probes)

    def step() -> float:
        start = time.process_time()
        optimizer.zero_grad()
        F.cross_entropy(demon.module(x), y).backward()
        optimizer.step()
        return time.process_time() - start

    before = median([step() for _ in range(4)][1:])
    start = time.process_time()
    event = demon.prune()
    taken = time.process_time() - start
    after = median([step() for _ in range(4)][1:])
    return {
        "step_seconds": before, "step_seconds_narrow": after, "check_seconds": taken,
        "steps": taken / before, "stages": event.seconds, "failure": event.failure,
        "params": [demon.dense.size.params, event.size.params],
        "macs": [demon.dense.size.macs, event.size.macs],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    figures = {"surroundings": surroundings(["torch"]), "step": overhead(), "check": check()}
    text = json.dumps(figures, indent=1)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()

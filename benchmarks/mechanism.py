"""Why neurons die: the paper's mechanism on the digits, over seeds, as a table and a plot.

    python -m benchmarks.mechanism [--seeds 5] [--out benchmarks/results/mechanism]

Runs of one network that differ in the pressure alone: none; noise on all parameters; noise on those
of living neurons; penalty; penalty and noise on the living. Noise that reaches the dead wakes them
up again, masked it does not. Nothing is cut while a run lasts: what is counted are the neurons that
never fire on the training images, in eval mode. A run is a hundred times shorter than the paper's,
and its noise so much louder (a random walk goes as far as its standard deviation times the root of
the number of steps).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import demp_fx
from benchmarks.measure import surroundings
from demp_fx.recipe import Recipe
from demp_fx.training.deaths import death_test
from demp_fx.training.pressure import Pressure

STEPS, EVERY, BATCH, RATE = 800, 40, 64, 0.1
PENALTY, STD = 5e-3, 4e-2
KINDS: dict[str, tuple[float, float, bool]] = {
    "plain": (0.0, 0.0, True),
    "noise on all": (0.0, STD, False),
    "noise on the living": (0.0, STD, True),
    "penalty": (PENALTY, 0.0, True),
    "penalty, noise on the living": (PENALTY, STD, True),
}


class Everywhere(Pressure):
    """Noise that does not ask who is alive."""

    def masks(self) -> dict[str, tuple[int, Tensor]]:
        return {}


def network() -> nn.Module:
    """Three layers of neurons with batch norm."""
    layers: list[nn.Module] = []
    inputs = 1
    for width, stride in ((32, 1), (64, 2), (64, 1)):
        layers += [nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width),
                   nn.ReLU()]  # fmt: skip
        inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from demp_fx.training.config import DataConfig
    from demp_fx.training.datasets import load_data

    train, test = load_data(DataConfig(kind="digits"))
    (x, y), (u, v) = (s.take(torch.arange(len(s))) for s in (train, test))
    return x.float() / 128 - 1, y, u.float() / 128 - 1, v


def run(kind: str, seed: int) -> dict[str, Any]:
    """Dead neurons over the steps of one run, and its accuracy at the end."""
    penalty, std, masked = KINDS[kind]
    images, labels, test_images, test_labels = digits()
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9)
    recipe = Recipe(penalty=penalty, noise_std=std, span=STEPS, prune_every=10**9, seed=seed,
                    prune_at_start=False)  # fmt: skip
    demon = demp_fx.Demon(model, optimizer, images[:2], recipe, [images])
    if not masked:
        demon.pressure = Everywhere(demon.module, demon.now.layers, recipe.takes)
    dead = []
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            found, _ = death_test(demon.module, [images], (False,))
            dead.append(sum(int(d.mask.sum()) for d in found.values()))
        demon.module.train()
        chosen = torch.randint(len(images), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(demon.module(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        demon.step()
    with torch.no_grad():
        right = demon.module.eval()(test_images).argmax(1) == test_labels
    return {"dead": dead, "accuracy": float(right.float().mean())}


def plot(runs: dict[str, list[dict[str, Any]]], neurons: int) -> str:
    from matplotlib.axes import Axes

    from demp_fx.report.plots import picture

    def draw(axes: Axes) -> None:
        steps = list(range(0, STEPS + 1, EVERY))
        for kind, found in runs.items():
            curves = [[100 * d / neurons for d in r["dead"]] for r in found]
            (line,) = axes.plot(steps, [statistics.mean(c) for c in zip(*curves, strict=True)],
                                label=kind)  # fmt: skip
            low, high = ([edge(c) for c in zip(*curves, strict=True)] for edge in (min, max))
            axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15)
        axes.set_xlabel("step")
        axes.set_ylabel("dead neurons, %")
        axes.legend(fontsize=7)

    return picture(draw, (7.2, 3.6))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    runs: dict[str, list[dict[str, Any]]] = {}
    neurons = 32 + 64 + 64
    for kind in KINDS:
        runs[kind] = [run(kind, seed) for seed in range(given.seeds)]
        ends = [r["dead"][-1] for r in runs[kind]]
        scores = [r["accuracy"] for r in runs[kind]]
        print(f"{kind:<25} dead of {neurons}: mean {statistics.mean(ends):5.1f} {ends}  "
              f"accuracy {statistics.mean(scores):.3f}", flush=True)  # fmt: skip
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        data = {"surroundings": surroundings(["torch"]), "neurons": neurons, "every": EVERY,
                "runs": runs}  # fmt: skip
        given.out.with_suffix(".json").write_text(json.dumps(data) + "\n")
        given.out.with_suffix(".svg").write_text(plot(runs, neurons))


if __name__ == "__main__":
    main()

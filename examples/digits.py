"""Train a small ResNet on handwritten digits until channels die, then cut them out.

Run as `python -m examples.digits`, or `make demo`. An L1 penalty on the BatchNorm scales, applied
as a soft threshold after every step, drives whole channels to a scale of exactly zero.
`demp_fx.compile` removes them, together with what never fires on the training images.
"""

from __future__ import annotations

import copy
import shutil
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import demp_fx
from demp_fx.emit import folder

EPOCHS, BATCH, RATE, PENALTY = 25, 64, 0.05, 0.12
OUT = Path("digits-narrow")


class Block(nn.Module):
    """Two convolutions around which a shortcut goes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Identity()
            if stride == 1
            else nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Five blocks for images of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(32)
        self.blocks = nn.Sequential(
            Block(32, 32, 1), Block(32, 64, 2), Block(64, 64, 1), Block(64, 128, 2),
            Block(128, 128, 1),
        )  # fmt: skip
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on, and the fifth of them to test on."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[360:], order[:360]
    return images[train], labels[train], images[test], labels[test]


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """SGD with momentum, a one-cycle learning rate, and a soft threshold on every BN scale."""
    scales = [m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=5e-4)
    steps = EPOCHS * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    model.train()
    for step in range(steps):
        chosen = torch.randint(len(images), (BATCH,))
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for scale in scales:
                scale.copy_(F.softshrink(scale, PENALTY * optimizer.param_groups[0]["lr"]))
        if step + 1 < steps:
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that the model names right."""
    right = model.eval()(images).argmax(1) == labels
    return float(right.float().mean())


def step_times(models: list[nn.Module], images: Tensor, labels: Tensor) -> list[float]:
    """Median milliseconds of one training step each, taken in turns so that noise hits all."""
    optimizers = [torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9) for model in models]
    times: list[list[float]] = [[] for _ in models]
    for _ in range(25):
        for model, optimizer, taken in zip(models, optimizers, times, strict=True):
            model.train()
            start = time.perf_counter()
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken[5:]) for taken in times]


def main() -> None:
    """Train, compile, compare."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # so small a network only loses by more
    console = Console()
    images, labels, test_images, test_labels = digits()
    model = ResNet()
    start = time.perf_counter()
    train(model, images, labels)
    console.print(f"trained for {EPOCHS} epochs in {time.perf_counter() - start:.0f} s")

    model.eval()
    result = demp_fx.compile(model, images[:2], calibration=images.split(256))
    report = result.report
    scores = [accuracy(net, test_images, test_labels) for net in (model, result.module)]
    # timing trains on, so it does so on copies
    copies: list[nn.Module] = [copy.deepcopy(model), copy.deepcopy(result.module)]
    times = step_times(copies, images[:128], labels[:128])

    table = Table(title="digits", title_justify="left")
    table.add_column("")
    for heading in ("dense", "narrow", "left"):
        table.add_column(heading, justify="right")
    for name, dense, narrow in (
        ("parameters", report.params_before, report.params_after),
        ("MACs", report.macs_before, report.macs_after),
        ("channels", report.channels_before, report.channels_after),
    ):
        table.add_row(name, f"{dense:,}", f"{narrow:,}", f"{narrow / dense:.1%}")
    table.add_row("ms a step", *(f"{t:.1f}" for t in times), f"{times[1] / times[0]:.1%}")
    table.add_row("test accuracy", *(f"{score:.1%}" for score in scores), "")
    console.print(table)
    if report.verification is not None:
        console.print(f"relative error in float64: {report.verification.eval_error:.1e}")
    shutil.rmtree(OUT, ignore_errors=True)
    folder.write(result, OUT)
    console.print(f"wrote {OUT}")


if __name__ == "__main__":
    main()

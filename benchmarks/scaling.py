"""How analysis and compile grow with a network's depth and width.

    python -m benchmarks.scaling

*Depth*: a residual network of so many convolutions (each with its BatchNorm), 16 channels wide.
*Width*: a network of seven layers (pointwise and depthwise convolutions, BatchNorms, a residual
sum, a classifier) whose parameters are proportional to its channels. Half of the channels of each
BatchNorm are dead; the stream's die alike in all layers, so that they go. Seconds of CPU on one
thread, medians, without verification. The exponent p of seconds ~ size^p is a least-squares fit in
logarithms, over all sizes and over the upper half of them, where fixed costs no longer hide it.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import demp_fx
from benchmarks.measure import Contender, median, side_by_side, surroundings

DEPTHS = (50, 100, 200, 500, 1000)
WIDTHS = (64, 256, 1024, 4096, 16384, 65536)
STAGES = ("trace", "analyze", "compile")

Row = dict[str, float | int]


class Block(nn.Module):
    """Two layers and a way around them."""

    def __init__(self, width: int, groups: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_layer(width, width, 3, groups), nn.ReLU(), *_layer(width, width, 3, groups)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def _layer(inputs: int, outputs: int, kernel: int, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


def deep(depth: int) -> nn.Module:
    """`depth` convolutions in residual blocks of two."""
    blocks = [Block(16) for _ in range((depth - 1) // 2)]
    return _half_dead(nn.Sequential(*_layer(3, 16, 3), *blocks, *_head(16)))


def wide(width: int) -> nn.Module:
    """A stem, a depthwise block and a classifier."""
    return _half_dead(nn.Sequential(*_layer(3, width, 1), Block(width, width), *_head(width)))


def _head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]


def _half_dead(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight[::2] = 0.0
                norm.bias[::2] = 0.0
    return model.eval()


def measure(build: Callable[[int], nn.Module], size: int, rounds: int) -> Row:
    """Seconds by stage for one size."""
    torch.manual_seed(0)
    model, x = build(size), torch.randn(2, 3, 8, 8)
    graph = demp_fx.trace(model, x)
    seconds = side_by_side(
        {
            "trace": Contender(lambda _: demp_fx.trace(model, x)),
            "analyze": Contender(lambda _: demp_fx.analyze(graph)),
            "compile": Contender(lambda _: demp_fx.compile(model, x, verify=False)),
        },
        rounds,
    )
    report = demp_fx.compile(model, x, verify=False).report
    return {
        "size": size,
        "params": report.params_before,
        "removed": report.params_before - report.params_after,
        **{stage: median(seconds[stage]) for stage in STAGES},
    }


def exponent(rows: list[Row], stage: str) -> float:
    """p of seconds ~ size^p, by least squares in logarithms."""
    x = [math.log(row["size"]) for row in rows]
    y = [math.log(row[stage]) for row in rows]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def _section(title: str, rows: list[Row]) -> str:
    lines = [f"## {title}\n", f"| {title.lower()} | params | removed | trace (s) | analyze (s) | "
             "compile (s) |", "| ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for row in rows:
        counts = " | ".join(f"{row[key]:,}" for key in ("size", "params", "removed"))
        lines.append(f"| {counts} | " + " | ".join(f"{row[s]:.3f}" for s in STAGES) + " |")
    for label, chosen in (("all sizes", rows), ("upper half", rows[len(rows) // 2 :])):
        fits = ", ".join(f"{stage} {exponent(chosen, stage):.2f}" for stage in STAGES)
        lines.append(f"{chr(10) if label == 'all sizes' else ''}Exponent, {label}: {fits}.  ")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the tables, and write them as Markdown and JSON."""
    parser = argparse.ArgumentParser(description="Growth of analysis and compile time.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[Row]] = {}
    for name, build, sizes in (("Depth", deep, DEPTHS), ("Width", wide, WIDTHS)):
        found[name] = []
        for size in sizes:
            found[name].append(measure(build, size, options.rounds))
            print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
    about = surroundings(("torch",)) | {
        "command": shlex.join(["python", "-m", "benchmarks.scaling", *sys.argv[1:]])
    }
    text = "\n\n".join(
        [
            "# Growth of analysis and compile time",
            f"`{about['command']}` on "
            + ", ".join(f"{k} {v}" for k, v in about.items() if k != "command")
            + f"; medians of {options.rounds} rounds. What is measured: `benchmarks/scaling.py`.",
            *(_section(name, rows) for name, rows in found.items()),
        ]
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "scaling.json").write_text(json.dumps({**about, **found}, indent=1) + "\n")
    (options.out / "scaling.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

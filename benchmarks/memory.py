"""Peak memory of `compile()`, as a multiple of the network's weights.

    python -m benchmarks.memory

Each case runs in a process of its own, forked before anything large exists. Resident memory is
counted from there, so the multiple includes the original's weights, which stay alive: a copy as
large as the original makes 2. The peak is the kernel's (`VmHWM`), reset before `compile`. Weights
of 1 GiB and more; nothing dead is the worst case, since then the narrow network is as large.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import demp_fx
from benchmarks.measure import surroundings
from benchmarks.zoo.runner import Found, Task, run

GOAL = 2.2
LIMIT = 900.0  # seconds for one case


def linear(width: int = 8192, depth: int = 4) -> nn.Module:
    """Few large matrices: the largest is a quarter of all weights."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def convolutions(width: int = 1024, depth: int = 30) -> nn.Module:
    """Many matrices of a middling size."""
    layers: list[nn.Module] = []
    for inputs in (3, *[width] * depth):
        conv = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (linear, (2, 8192)),
    "convolutions": (convolutions, (2, 3, 4, 4)),
}


def measure(name: str, fraction: float, verify: bool, send: Callable[[Found], None]) -> None:
    """One case: bytes of weights, and the peak while compiling."""
    torch.set_num_threads(1)
    start = _status("VmRSS")
    build, shape = CASES[name]
    model = build().eval()
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                dead = round(norm.num_features * fraction)
                norm.weight[:dead] = 0.0
                norm.bias[:dead] = 0.0
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    report = demp_fx.compile(model, torch.randn(shape), verify=verify).report
    peak = _status("VmHWM") - start
    send({
        "weights_gib": weights / 2**30, "peak_gib": peak / 2**30, "multiple": peak / weights,
        "param_sparsity": report.param_sparsity,
    })  # fmt: skip


def _status(key: str) -> int:
    """Bytes, from what the kernel says about this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def main() -> None:
    """Measure, print the table, and write it as Markdown and JSON."""
    parser = argparse.ArgumentParser(description="Peak memory of compile().")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only", choices=list(CASES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    demp_fx.compile(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval(), torch.randn(2, 4))
    tasks = [
        Task((name, fraction, verify), _case(name, fraction, verify), LIMIT)
        for name in ([options.only] if options.only else CASES)
        for fraction in (0.0, 0.5)
        for verify in (False, True)
    ]
    rows = []
    for (name, fraction, verify), found in run(tasks, jobs=1):
        rows.append({"network": name, "dead": fraction, "verify": verify} | found)
        print(rows[-1], file=sys.stderr, flush=True)
    about = surroundings(("torch",)) | {
        "command": shlex.join(["python", "-m", "benchmarks.memory", *sys.argv[1:]])
    }
    lines = [
        f"# Peak memory of compile() (goal: at most {GOAL}x the weights)\n",
        f"`{about['command']}` on "
        + ", ".join(f"{k} {v}" for k, v in about.items() if k != "command")
        + ". How: `benchmarks/memory.py`.\n",
        "| network | weights (GiB) | dead | verified | peak (GiB) | multiple |",
        "| --- | ---: | ---: | --- | ---: | ---: |",
        *(
            f"| {r['network']} | {r['weights_gib']:.2f} | {r['dead']:.0%} | "
            f"{'yes' if r['verify'] else 'no'} | {r['peak_gib']:.2f} | {r['multiple']:.2f} |"
            if "multiple" in r
            else f"| {r['network']} | | {r['dead']:.0%} | | {r['error']} | |"
            for r in rows
        ),
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "memory.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    (options.out / "memory.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _case(name: str, fraction: float, verify: bool) -> Callable[[Callable[[Found], None]], None]:
    return lambda send: measure(name, fraction, verify, send)


if __name__ == "__main__":
    main()

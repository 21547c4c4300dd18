"""The controller on the digits: three networks, two targets each, and where the runs end.

    python -m benchmarks.controller [--seeds 2] [--out benchmarks/results/controller.json]

528 steps each, of which the span is 80 %; the first penalty is a guess of its order of magnitude.
The span is two hundred times as short as the paper's, and the noise as much louder: without it many
neurons stay at a positive bias, constant but not dead, above all in the MLP, which has no
normalisation.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.measure import surroundings
from demp_fx.recipe import Measure
from demp_fx.training.config import RunConfig
from demp_fx.training.metrics import read
from demp_fx.training.runs import Run

NETWORKS = {
    "resnet": ("examples/digits.py:ResNet", 1e-2),
    "vgg": ("examples/vgg.py:for_digits", 1e-2),
    "mlp": ("examples/digits.py:MLP", 2e-2),
}
NOISE = 1e-2
TARGETS: tuple[tuple[Measure, float], ...] = (("macs", 0.35), ("params", 0.2))


def run(folder: Path, name: str, measure: Measure, share: float, seed: int) -> dict[str, Any]:
    """The figures of one run."""
    model, penalty = NETWORKS[name]
    config = RunConfig.from_dict({
        "model": model, "data": {"kind": "digits"}, "optimizer": {"name": "sgd", "lr": 0.1},
        "schedule": {"name": "onecycle"}, "batch": 64, "epochs": 24, "threads": 1,
        "probe": {"batches": 2, "size": 256}, "checkpoint_every": "100%",
        "seed": seed,
        "demon": {"penalty": penalty, "noise_std": NOISE, "span": "80%", "prune_every": 22,
                  "target": {measure: share}, "seed": seed},
    })  # fmt: skip
    figures = Run(config, folder, say=lambda text: None).go()
    events = [r for r in read(folder) if r["kind"] == "event"]
    return {
        "network": name, "seed": seed, "measure": measure, "target": share,
        "left": figures["after"][measure] / figures["before"][measure],
        "verdict": figures["target"], "test_accuracy": figures["test_accuracy"],
        "steps": figures["steps"],
        "penalty": penalty, "noise_std": NOISE,
        "trajectory": [[e["step"], e["aim"], e["size"][measure] / figures["before"][measure],
                        e["penalty"]] for e in events],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    results = []
    for seed, name, (measure, share) in product(range(given.seeds), NETWORKS, TARGETS):
        with tempfile.TemporaryDirectory() as work:
            found = run(Path(work) / "run", name, measure, share, seed)
        print(f"seed {seed} {name:<8}{found['verdict']}, accuracy {found['test_accuracy']:.4f}",
              flush=True)  # fmt: skip
        results.append(found)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        data = {"surroundings": surroundings(["torch"]), "runs": results}
        given.out.write_text(json.dumps(data) + "\n")


if __name__ == "__main__":
    main()

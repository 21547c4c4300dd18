"""Dense against DemP: accuracy, sizes, and the time of the whole run.

    python -m benchmarks.dense_vs_demp [RECIPE] [--data FOLDER] [--seeds 2] [--penalties 0.01]
        [--out benchmarks/results/digits.json]

The runs of one seed go on side by side, each in a process of its own with one thread, so that what
else the machine does hits them alike. Reported are the seconds of training (batches, steps, death
checks, narrowing; no testing) by the clock, and as processor time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measure import surroundings

ROOT = Path(__file__).parents[1]


def side_by_side(recipes: dict[str, dict[str, Any]], work: Path) -> dict[str, dict[str, Any]]:
    """The figures of runs that go on at the same time."""
    processes = {}
    for name, recipe in recipes.items():
        path = work / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        command = [sys.executable, "-m", "demp_fx.cli", "train", str(path), "--quiet",
                   "--overwrite", "--out", str(work / name)]  # fmt: skip
        with (work / f"{name}.log").open("w") as log:
            processes[name] = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    for name, process in processes.items():
        if process.wait() != 0:
            raise SystemExit((work / f"{name}.log").read_text())
    return {name: json.loads((work / name / "result.json").read_text()) for name in recipes}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path, nargs="?", default=ROOT / "examples/digits.yaml")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--penalties", type=float, nargs="+")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    base = yaml.safe_load(given.recipe.read_text())
    if given.data is not None:
        base["data"]["path"] = str(given.data.resolve())
    penalties = given.penalties or [base["demon"]["penalty"]]
    results = []
    with tempfile.TemporaryDirectory() as work:
        for seed in range(given.seeds):
            recipes = {"dense": {**base, "seed": seed, "demon": None}}
            for penalty in penalties:
                demon = {**base["demon"], "penalty": penalty, "seed": seed}
                recipes[f"demp {penalty:g}"] = {**base, "seed": seed, "demon": demon}
            figures = side_by_side(recipes, Path(work))
            dense = figures["dense"]
            for name, run in figures.items():
                run |= {"name": name, "seed": seed,
                        "speedup": dense["seconds"] / run["seconds"],
                        "speedup_cpu": dense["cpu_seconds"] / run["cpu_seconds"]}  # fmt: skip
                left = {
                    k: round(run["after"][k] / run["before"][k], 4) for k in run.get("after", {})
                }
                print(f"seed {seed} {name:<12} accuracy {run['test_accuracy']:.4f}, "
                      f"{run['seconds']:.0f} s, CPU {run['cpu_seconds']:.0f} s, "
                      f"{run['speedup']:.2f}x ({run['speedup_cpu']:.2f}x CPU), left {left}",
                      flush=True)  # fmt: skip
                results.append(run)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        base["data"].pop("path", None)
        data = {"surroundings": surroundings(["torch"]), "recipe": base, "runs": results}
        given.out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()

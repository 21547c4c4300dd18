"""Run the zoo, and keep what is found after every network.

    python -m benchmarks.zoo --suite torchvision --only 'resnet*' --deaths zero --cuts pays

Writes benchmarks/results/zoo.json and zoo.md. Rows of earlier runs stay until the same network is
run again (`--fresh` starts anew); each says at which commit it was measured.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

import demp_fx
from benchmarks.measure import surroundings
from benchmarks.zoo import ours, peer
from benchmarks.zoo.networks import Network
from benchmarks.zoo.runner import Task, run
from benchmarks.zoo.suites import SUITES, select
from benchmarks.zoo.table import Row, markdown, summary

PACKAGES = ("torch", "torchvision", "timm", "torch-pruning")
ABOUT = (
    "Half of the channels of every layer are dead (`benchmarks/zoo/killing.py`). What is removable "
    "is found by running the network (`tests/zoo/oracle.py`). Seconds are of CPU, on one thread, "
    "without verification, for one image of 224 where the network takes any size. Torch-Pruning is "
    "asked for the same dead channels in the same run, and its pruner for half of all channels "
    "(`benchmarks/zoo/peer.py`). Rows stay until their network is run again; `zoo.json` says at "
    "which commit each was measured."
)


def main() -> None:
    """Parse, run, write."""
    options = _parser().parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of other people's networks
    chosen = select(options.suite, options.only)
    if not chosen:
        sys.exit("no network has such a name")
    if options.list:
        print("\n".join(f"{n.suite} {n.name}" for n in chosen))
        return
    _warm_up()
    results = _Results(options)
    tasks = _tasks(chosen, options)
    if options.resume:
        tasks = [t for t in tasks if not results.has(*t.key)]
    tasks.sort(key=lambda t: results.size(t.key[0]))  # as far as it is known, the small ones first
    for (key, part), found in run(tasks, options.jobs):
        results.add(key, part, found)
        print(f"{' '.join(key)} {part}: {_brief(found)}", file=sys.stderr, flush=True)
    print("\n".join(summary(list(results.rows.values()))))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument(
        "--only", action="append", default=[], help="a pattern of names; repeatable"
    )
    parser.add_argument("--suite", action="append", default=[], choices=list(SUITES))
    parser.add_argument("--deaths", choices=("zero", "constant", "both"), default="zero")
    parser.add_argument("--cuts", choices=("pays", "always", "never"), default="pays")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for one network")
    parser.add_argument("--peer-limit", type=float, default=120.0, help="seconds for Torch-Pruning")
    parser.add_argument("--without-peer", action="store_true")
    parser.add_argument("--resume", action="store_true", help="only networks without a row yet")
    parser.add_argument("--fresh", action="store_true", help="forget rows of earlier runs")
    parser.add_argument("--list", action="store_true", help="only name the networks")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    return parser


def _tasks(networks: list[Network], options: argparse.Namespace) -> list[Task]:
    kinds = ("zero", "constant") if options.deaths == "both" else (options.deaths,)
    tasks = []
    for network in networks:
        for deaths in kinds:
            key, constant = (network.suite, network.name, deaths), deaths == "constant"
            work = functools.partial(ours.measure, network, constant, options.cuts)
            tasks.append(Task((key, "ours"), work, options.limit))
            if not options.without_peer:
                for part, measure in {"peer": peer.measure, "pruner": peer.measure_pruner}.items():
                    work = functools.partial(measure, network, constant)
                    tasks.append(Task((key, part), work, options.peer_limit))
    return tasks


def _warm_up() -> None:
    """First calls import and register much; both sides have made theirs before any is timed."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    demp_fx.compile(model, x)
    tp.DependencyGraph().build_dependency(model, x)


class _Results:
    """Rows by key, on disk after each addition."""

    def __init__(self, options: argparse.Namespace) -> None:
        options.out.mkdir(parents=True, exist_ok=True)
        self.json, self.page = options.out / "zoo.json", options.out / "zoo.md"
        self.cuts = options.cuts
        self.about: dict[str, str] = {}
        self.rows: dict[tuple[str, ...], Row] = {}
        if self.json.exists() and not options.fresh:
            self.about = json.loads(self.json.read_text())
            earlier: Any = self.about.pop("rows")
            self.rows = {(r["suite"], r["network"], r["deaths"]): r for r in earlier}
        others = [SUITES[suite].package for suite in options.suite]
        self.about |= surroundings([*PACKAGES, *filter(None, others)])
        self.about["command"] = shlex.join(["python", "-m", "benchmarks.zoo", *sys.argv[1:]])

    def has(self, key: tuple[str, str, str], part: str) -> bool:
        """Whether this was measured before."""
        return bool(self.rows.get(key, {}).get(part))

    def size(self, key: tuple[str, str, str]) -> int:
        """The parameters of a network that was measured before."""
        return int(self.rows.get(key, {}).get("ours", {}).get("params", 0))

    def add(self, key: tuple[str, str, str], part: str, found: dict[str, Any]) -> None:
        suite, network, deaths = key
        row = self.rows.setdefault(key, {"ours": {}, "peer": {}})
        row.update(suite=suite, network=network, deaths=deaths, cuts=self.cuts)
        row[part] = found | {"commit": self.about["demp_fx"]}
        ordered = [self.rows[k] for k in sorted(self.rows)]
        _write(self.json, json.dumps({**self.about, "rows": ordered}, indent=1) + "\n")
        where = ", ".join(f"{k} {v}" for k, v in self.about.items() if k != "command")
        _write(self.page, markdown(ordered, [f"`{self.about['command']}` on {where}.", ABOUT]))


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text)
    os.replace(part, path)


def _brief(found: dict[str, Any]) -> str:
    keys = ("error", "refused", "oracle_error", "eval_error", "resized_error", "train_error",
            "backward", "removed", "removable", "seconds", "peak_mb")  # fmt: skip
    return ", ".join(f"{k} {found[k]:.3g}" if isinstance(found[k], float) else f"{k} {found[k]}"
                     for k in keys if found.get(k) not in (None, ""))  # fmt: skip


if __name__ == "__main__":
    main()

"""Timing side by side: contenders take turns, so that what else goes on hits them alike."""

from __future__ import annotations

import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

Clock = Callable[[], float]


@dataclass(frozen=True)
class Contender:
    """`run` is timed. What it takes is made by `prepare` each time anew, which is not."""

    run: Callable[[object], object]
    prepare: Callable[[], object] = lambda: None


def side_by_side(
    contenders: dict[str, Contender], rounds: int, clock: Clock = time.process_time
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after one round that does not count.

    The order alternates from round to round, and no garbage is collected while the clock runs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        order = list(contenders) if number % 2 else list(reversed(contenders))
        for name in order:
            contender = contenders[name]
            subject = contender.prepare()
            gc.collect()
            gc.disable()
            start = clock()
            contender.run(subject)
            taken = clock() - start
            gc.enable()
            if number:
                seconds[name].append(taken)
    return seconds


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over rounds of our time relative to theirs in the same round."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def surroundings(packages: Iterable[str]) -> dict[str, str]:
    """What a figure depends on: our commit, versions, processor."""
    root = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True
    ).stdout.strip()
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    ours = {"demp_fx": commit or "unknown", "cpu": cpu, "python": platform.python_version()}
    return ours | {package: version(package) for package in packages}

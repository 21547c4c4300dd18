"""One network through demp_fx: is it exact, is everything gone that can go, how long does it take?

Time is that of `compile(verify=False)` on float32 weights and one image of the usual size, in
seconds of CPU; verification is timed apart. Everything that is compared is compared in float64,
against weights compiled in float64.
"""

from __future__ import annotations

import gc
import resource
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import demp_fx
from benchmarks.zoo.killing import kill
from benchmarks.zoo.networks import Inputs, Network, in_float64
from benchmarks.zoo.outputs import (
    numbers,
    one_line,
    own_error,
    parameters,
    relative_error,
    trains,
    without_chance,
)
from demp_fx.errors import VerificationError
from demp_fx.passes.outcome import Pinned
from tests.zoo import oracle

REASONS = 6
STEADY = 1e-11  # beyond this, rounding alone makes train mode another one
REPEATED_BELOW = 0.5  # seconds: what is quicker is timed three times, and the median taken
BY_SIZES = "followed for the example inputs' sizes"  # how reports end on what code decided by them
Send = Callable[[dict[str, Any]], None]


def half_dead(network: Network, constant: bool) -> tuple[nn.Module, Inputs, dict[str, Any]]:
    """The network with half of its channels dead, its example inputs, and which are dead."""
    torch.manual_seed(0)
    model = without_chance(network.build()).eval()
    inputs = network.inputs(2, 1)
    deaths = kill(model, inputs, constant=constant)
    return model, inputs, deaths


def measure(network: Network, constant: bool, cuts: Any, send: Send) -> None:
    """Send what is found, as it is found."""
    model, inputs, deaths = half_dead(network, constant)
    send({"params": parameters(model), "killed": sum(len(d) for d in deaths.values())})
    try:
        _timed(model, network.usual(), cuts, send)
        gc.collect()
        model.double()
        narrow = _compiled(model, inputs, cuts, send)
        _compared(network, model, narrow, send)
        narrow = _for_training(model, narrow, inputs, cuts, send)
        _compared_in_training(network, model, narrow, send)
        del narrow
    except Exception as error:
        send({"error": one_line(error)})
        model.double()
    gc.collect()
    try:
        torch.manual_seed(0)
        model, _, _ = half_dead(network, constant)  # anew: train mode has moved the statistics
        model.double()
        trials = [
            in_float64(network.inputs(4, 1)),
            in_float64(network.inputs(2, 2 if network.flexible else 1)),
        ]
        send({"removable": oracle.removable(model, trials, own=True).removable})
    except Exception as error:
        send({"oracle_error": one_line(error)})
    send({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024})


def _timed(model: nn.Module, inputs: Inputs, cuts: Any, send: Send) -> None:
    taken: list[float] = []
    while len(taken) < (3 if not taken or taken[0] < REPEATED_BELOW else 1):
        gc.collect()
        gc.disable()
        start = time.process_time()
        report = demp_fx.compile(model, inputs, verify=False, cuts=cuts).report
        taken.append(time.process_time() - start)
        gc.enable()
    send({"seconds": sorted(taken)[len(taken) // 2],
          "stages": {k: round(v, 3) for k, v in report.seconds.items()}})  # fmt: skip


def _compiled(model: nn.Module, inputs: Inputs, cuts: Any, send: Send) -> nn.Module:
    doubled = in_float64(inputs)
    try:
        result = demp_fx.compile(model, doubled, cuts=cuts)
        send({"verify_s": round(result.report.seconds["verify"], 3)})
    except VerificationError as error:
        send({"refused": one_line(error)})
        result = demp_fx.compile(model, doubled, cuts=cuts, verify=False)
    report = result.report
    notes = result.module.meta.get("demp_fx")
    send({
        "removed": report.params_before - parameters(result.module),
        "front_end": "export" if getattr(notes, "exported", "") else "symbolic",
        "opaque": report.opaque,
        "decided": [a for a in report.assumptions if a.endswith(BY_SIZES)],
        "pinned": _reasons(report.pinned),
    })  # fmt: skip
    return result.module


def _reasons(pinned: list[Pinned]) -> list[str]:
    """What keeps most, each with one of its places."""
    channels: Counter[str] = Counter()
    places: dict[str, str] = {}
    for p in pinned:
        if p.op != "output":
            why = f"{p.reason} ({p.op})"
            channels[why] += p.channels
            places.setdefault(why, f"{p.node}, {(p.source or '').rpartition('site-packages/')[2]}")
    return [
        f"{n} channels: {why}, such as {places[why]}" for why, n in channels.most_common(REASONS)
    ]


def _compared(network: Network, model: nn.Module, narrow: nn.Module, send: Send) -> None:
    torch.manual_seed(1)
    x = in_float64(network.inputs(3, 1))
    send({"eval_error": relative_error(numbers(narrow, x, False), numbers(model, x, False))})
    if network.flexible:
        y = in_float64(network.inputs(2, 2))
        try:
            error = relative_error(numbers(narrow, y, False), numbers(model, y, False))
            send({"resized_error": error})
        except Exception as error:
            send({"resized_error": one_line(error)})


def _for_training(
    model: nn.Module, narrow: nn.Module, inputs: Inputs, cuts: Any, send: Send
) -> nn.Module:
    """What is trained: another graph, if the forward has a branch for train mode (heads, say)."""
    notes = narrow.meta.get("demp_fx")
    if not any("followed for eval mode" in note for note in getattr(notes, "baked", [])):
        return narrow
    result = demp_fx.compile(model.train(), in_float64(inputs), cuts=cuts)
    removed = result.report.params_before - result.report.params_after
    send({"train_graph": "its own", "removed": removed})
    return result.module


def _compared_in_training(
    network: Network, model: nn.Module, narrow: nn.Module, send: Send
) -> None:
    for batch, scale in ((3, 1), (16, 2 if network.flexible else 1)):
        x = in_float64(network.inputs(batch, scale))
        try:
            expected = numbers(model, x, True)
        except Exception as error:
            send({"train_error": f"the original: {one_line(error)}"})
            return
        own = own_error(model, x, expected)
        if own <= STEADY:
            send({"train_error": relative_error(numbers(narrow, x, True), expected)})
            break
        send({"train_error": f"the original: moves by {own:.0e} with the last digit of its input"})
    send({"backward": trains(narrow, x)})

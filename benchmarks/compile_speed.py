"""How long demp_fx takes, beside Torch-Pruning, and how fast what it hands over trains.

    python -m benchmarks.compile_speed

(a) *Analysis.* `demp_fx.analyze(graph)` finds labels, groups and what may go; tracing is timed
    beside it. Torch-Pruning's `DependencyGraph.build_dependency` traces and links layers;
    enumerating the groups is timed beside it.
(b) *Narrowing.* Half of the channels of every BatchNorm are dead (scale and shift zero).
    `demp_fx.compile(model, x, verify=False)` beside Torch-Pruning's documented way to take half of
    the channels: `BNScalePruner` with `pruning_ratio=0.5`, the classifier ignored, and `.step()`.
    The two do not cut alike (Torch-Pruning groups whole residual stages and cuts live channels with
    the dead), so the parameters left are printed too. Verification is timed apart.
(c) *Training.* A step (forward, backward, SGD with momentum) of the narrow module beside the same
    layers at the same widths in torchvision's own code, with the same weights. Deaths agree over
    each residual stage, so that there is such a network.

Networks see one 3x224x224 image in (a) and (b), as one compiles them. A training step takes eight
of 3x112x112: batch norm needs a batch, and at this size a step is neither all overhead nor minutes.
One thread, and CPU time of the process, in (a) and (b), so that other work on the machine does not
count; wall-clock time in (c). Medians over rounds in which the contenders take turns.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shlex
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

import demp_fx
from benchmarks.measure import Contender, median, ratio, side_by_side, surroundings
from tests.zoo.kill import kill_channels, kill_norms
from tests.zoo.shim import torchvision

ANALYSED = ("resnet18", "resnet50", "densenet121", "densenet201")
NARROWED = ("resnet50", "densenet121", "mobilenet_v2", "vgg16_bn")
TRAINED = ("resnet18", "vgg16_bn")
PACKAGES = ("torch", "torchvision", "torch-pruning")

Row = dict[str, float | int | str]


def analysis(name: str, rounds: int) -> Row:
    """(a) for one network."""
    model, x = _network(name), torch.randn(1, 3, 224, 224)
    graph = demp_fx.trace(model, x)
    seconds = side_by_side(
        {
            "analyze": Contender(lambda _: demp_fx.analyze(graph)),
            "trace": Contender(lambda _: demp_fx.trace(model, x)),
            "build_dependency": Contender(
                lambda m: tp.DependencyGraph().build_dependency(m, x),
                lambda: copy.deepcopy(model),
            ),
            "groups": Contender(
                lambda dependencies: list(dependencies.get_all_groups()),
                lambda: tp.DependencyGraph().build_dependency(copy.deepcopy(model), x),
            ),
        },
        rounds,
    )
    ours, theirs = seconds["analyze"], seconds["build_dependency"]
    return {
        "network": name,
        **{f"{key}_s": median(values) for key, values in seconds.items()},
        "ratio": ratio(ours, theirs),
    }


def narrowing(name: str, rounds: int) -> Row:
    """(b) for one network."""
    model, x = _network(name), torch.randn(1, 3, 224, 224)
    kill_norms(model, fraction=0.5, seed=0)
    left = {}

    def ours(subject: object) -> None:
        left["demp_fx"] = demp_fx.compile(subject, x, verify=False).report.params_after

    def theirs(subject: nn.Module) -> None:
        pruner = tp.pruner.BNScalePruner(
            subject,
            x,
            importance=tp.importance.BNScaleImportance(),
            pruning_ratio=0.5,
            ignored_layers=[[m for m in subject.modules() if isinstance(m, nn.Linear)][-1]],
        )
        pruner.step()
        left["torch_pruning"] = _params(subject)

    def fresh() -> nn.Module:
        return copy.deepcopy(model)

    seconds = side_by_side(
        {"compile": Contender(ours, fresh), "torch_pruning": Contender(theirs, fresh)}, rounds
    )
    verified = demp_fx.compile(model, x).report
    return {
        "network": name,
        "compile_s": median(seconds["compile"]),
        "torch_pruning_s": median(seconds["torch_pruning"]),
        "ratio": ratio(seconds["compile"], seconds["torch_pruning"]),
        "verify_s": verified.seconds["verify"],
        "params_before": _params(model),
        "params_demp_fx": left["demp_fx"],
        "params_torch_pruning": left["torch_pruning"],
    }


def training(name: str, rounds: int) -> Row:
    """(c) for one network."""
    model = _network(name)
    if name == "resnet18":
        kill_channels(model, _dead_by_stage(model))
    else:
        kill_norms(model, fraction=0.5, seed=0)
    x, target = torch.randn(8, 3, 112, 112), torch.randint(1000, (8,))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    narrow = demp_fx.compile(model, x).module
    plain = _at_widths_of(model, narrow)
    error = float((plain.eval()(x) - narrow.eval()(x)).detach().abs().max())
    if error > 1e-4:
        raise RuntimeError(f"{name}: the network written by hand is another one (off by {error})")
    seconds = side_by_side(
        {
            "narrow": Contender(_step(narrow, x, target)),
            "by_hand": Contender(_step(plain, x, target)),
            "dense": Contender(_step(model, x, target)),
        },
        rounds,
        clock=time.perf_counter,
    )
    return {
        "network": name,
        **{f"{key}_s": median(values) for key, values in seconds.items()},
        "ratio": ratio(seconds["narrow"], seconds["by_hand"]),
        "params": _params(narrow),
    }


def _network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return getattr(torchvision.models, name)().eval()


def _params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _dead_by_stage(resnet: nn.Module) -> dict[str, Tensor]:
    """Half of each stage's stream, alike in all its branches, and half inside each block."""
    dead = {}
    stage: dict[str, Tensor] = {}
    for name, norm in resnet.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            half = torch.randperm(norm.num_features)[: norm.num_features // 2]
            in_stream = name == "bn1" or not name.endswith("bn1")
            of = "layer1" if name == "bn1" else name.partition(".")[0]
            dead[name] = stage.setdefault(of, half) if in_stream else half
    return dead


def _at_widths_of(model: nn.Module, narrow: nn.Module) -> nn.Module:
    """The model's own code with every layer made anew at the narrow one's widths and weights."""
    plain = copy.deepcopy(model)
    state = narrow.state_dict()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            outputs, inputs = state[f"{name}.weight"].shape[:2]
            new = nn.Conv2d(
                inputs,
                outputs,
                layer.kernel_size,
                layer.stride,
                layer.padding,
                bias=layer.bias is not None,
            )
        elif isinstance(layer, nn.BatchNorm2d):
            new = nn.BatchNorm2d(len(state[f"{name}.weight"]))
        elif isinstance(layer, nn.Linear):
            new = nn.Linear(*reversed(state[f"{name}.weight"].shape))
        else:
            continue
        plain.set_submodule(name, new)
    plain.load_state_dict(state)
    return plain


def _step(model: nn.Module, x: Tensor, target: Tensor) -> object:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step(_: object) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()

    return step


def _geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _table(rows: list[Row]) -> str:
    def cell(key: str, value: object) -> str:
        if key.endswith("_s"):
            return f"{value:.3f}"
        return (
            f"{value:.2f}"
            if isinstance(value, float)
            else f"{value:,}"
            if isinstance(value, int)
            else str(value)
        )

    keys = list(rows[0])
    head = [key.removesuffix("_s") + (" (s)" if key.endswith("_s") else "") for key in keys]
    lines = [head, ["---"] + ["---:"] * (len(keys) - 1)]
    lines += [[cell(key, row[key]) for key in keys] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _markdown(result: dict[str, object]) -> str:
    where = ", ".join(f"{key} {value}" for key, value in result["surroundings"].items())
    return f"""# Speed of demp_fx.compile

`{result["command"]}` on {where}; {result["rounds"]} rounds, one thread.
What is compared, and how: `benchmarks/compile_speed.py`.

## (a) Analysis

{_table(result["analysis"])}

ratio: analyze / build_dependency.

## (b) Narrowing, half of the channels dead

{_table(result["narrowing"])}

ratio: compile without verification / Torch-Pruning;
geometric mean {result["narrowing_ratio"]:.2f} (wanted: at most 1; goal 0.5).

## (c) A training step

{_table(result["training"])}

ratio: narrow / by hand (wanted: at most 1.05).
"""


def main() -> None:
    """Measure, print the tables, and write them as Markdown and JSON."""
    parser = argparse.ArgumentParser(description="Time demp_fx beside Torch-Pruning.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, list[Row]] = {}
    for part, names in ((analysis, ANALYSED), (narrowing, NARROWED), (training, TRAINED)):
        rows[part.__name__] = []
        for name in names:
            print(f"{part.__name__}: {name}", file=sys.stderr, flush=True)
            rows[part.__name__].append(part(name, options.rounds))
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.compile_speed", *sys.argv[1:]]),
        "rounds": options.rounds,
        "surroundings": surroundings(PACKAGES),
        "narrowing_ratio": _geometric_mean([float(row["ratio"]) for row in rows["narrowing"]]),
        **rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "compile_speed.json").write_text(json.dumps(result, indent=2) + "\n")
    text = _markdown(result)
    (options.out / "compile_speed.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

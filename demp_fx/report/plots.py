"""Pictures of a run, as SVG."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = dict[str, Any]
Draw = Callable[["Axes"], None]
_SIZE = (7.2, 3.0)
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "demp", "font.size": 9, "legend.framealpha": 0,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
}  # fmt: skip


def picture(draw: Draw, size: tuple[float, float] = _SIZE) -> str:
    """One figure as an SVG element. Raises `ImportError` without matplotlib."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace("#000000", "currentColor")  # light and dark


def deaths(events: Sequence[Record], before: dict[str, int]) -> str:
    """What is left of every layer of neurons, step by step: dark is gone."""

    def draw(axes: Axes) -> None:
        layers, steps = list(before), [e["step"] for e in events]
        share = [[1 - e["widths"][n] / before[n] for e in events] for n in layers]
        image = axes.imshow(share, aspect="auto", cmap="magma_r", vmin=0, vmax=1,
                            interpolation="nearest")  # fmt: skip
        axes.set_yticks(range(len(layers)), layers)
        ticks = range(0, len(steps), max(1, len(steps) // 8))
        axes.set_xticks(list(ticks), [str(steps[k]) for k in ticks])
        axes.set_xlabel("step of the death check")
        axes.figure.colorbar(image, ax=axes, label="share of channels gone")

    return picture(draw, (_SIZE[0], max(2.2, 0.22 * len(before) + 0.9)))


def learning(steps: Sequence[Record], epochs: Sequence[Record]) -> str:
    """Loss, and accuracy on both splits."""

    def draw(axes: Axes) -> None:
        axes.plot([s["step"] for s in steps], [s["loss"] for s in steps], color="0.75", lw=0.7,
                  label="loss of a batch")  # fmt: skip
        where = [e["step"] for e in epochs]
        axes.plot(where, [e["test_loss"] for e in epochs], color="tab:blue", label="test loss")
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.set_ylim(bottom=0)
        other = axes.twinx()
        for key, color, name in (("accuracy", "tab:green", "training"),
                                 ("test_accuracy", "tab:red", "test")):  # fmt: skip
            other.plot(where, [100 * e[key] for e in epochs], color=color, label=f"{name} accuracy")
        other.set_ylabel("accuracy, %")
        lines = [*axes.get_lines(), *other.get_lines()]
        other.legend(
            lines, [str(line.get_label()) for line in lines], fontsize=7, loc="center right"
        )

    return picture(draw)


def work(steps: Sequence[Record], events: Sequence[Record], before: dict[str, int]) -> str:
    """MACs, parameters, channels and the time of a step, relative to the beginning."""

    def draw(axes: Axes) -> None:
        for key in ("macs", "params", "channels"):
            axes.step([e["step"] for e in events], [e["size"][key] / before[key] for e in events],
                      where="post", label=key.replace("macs", "MACs"))  # fmt: skip
        times = [s["step_seconds"] for s in steps]
        first = _median(times[: max(1, len(times) // 10)])
        window = max(1, len(times) // 25)
        smooth = [_median(times[max(0, k - window) : k + window + 1]) for k in range(len(times))]
        axes.plot([s["step"] for s in steps], [t / first for t in smooth], color="0.4", lw=1,
                  label="time of a step")  # fmt: skip
        axes.set_xlabel("step")
        axes.set_ylabel("of the dense network")
        axes.set_ylim(0, 1.25)
        axes.legend(fontsize=7)

    return picture(draw)


def pressure(steps: Sequence[Record]) -> str:
    """Penalty and noise."""

    def draw(axes: Axes) -> None:
        where = [s["step"] for s in steps]
        axes.plot(
            where, [s["penalty"] for s in steps], color="tab:purple", label="penalty (lambda)"
        )
        axes.set_xlabel("step")
        axes.set_ylabel("lambda")
        other = axes.twinx()
        other.plot(
            where, [s["noise_std"] for s in steps], color="tab:orange", label="noise (sigma)"
        )
        other.set_ylabel("sigma")
        _legend(axes, other)

    return picture(draw)


def trajectory(events: Sequence[Record], measure: str, target: float, before: int) -> str:
    """What is left against what was aimed at, check by check, and the penalty that did it."""

    def draw(axes: Axes) -> None:
        where = [e["step"] for e in events]
        axes.plot(where, [e["size"][measure] / before for e in events], marker=".", label="left")
        axes.plot(where, [e["aim"] for e in events], color="0.6", ls="--", label="reference")
        axes.axhline(target, color="tab:red", lw=0.8, label="target")
        axes.set_xlabel("step")
        axes.set_ylabel(f"share of {measure} left")
        axes.set_ylim(0, 1.05)
        other = axes.twinx()
        other.plot(where, [max(e["penalty"], 1e-12) for e in events], color="tab:purple", lw=0.8)
        other.set_yscale("log")
        other.set_ylabel("lambda", color="tab:purple")
        axes.legend(fontsize=7)

    return picture(draw)


def _legend(left: Axes, right: Axes) -> None:
    """One legend for two axes."""
    lines = [*left.get_lines(), *right.get_lines()]
    right.legend(lines, [str(line.get_label()) for line in lines], fontsize=7)


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
